"""What `rewardrt export` writes and everything else reads: the spec of a model, and the folder that it lies in."""
