"""The bundle that `rewardrt export` writes and every other command reads: a model's spec, and its folder of files."""
