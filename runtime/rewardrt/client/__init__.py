"""What `RewardClient` does between rows and a server: wire, batches, servers."""
