"""What is between `RewardClient` and a server: rows as JSON, batches of rows, the choice of a server."""
