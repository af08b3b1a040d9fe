"""Whether the exported bundle gives the rewards that the trained model gives."""
