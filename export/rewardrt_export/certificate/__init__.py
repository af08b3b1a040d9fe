"""Check that the exported bundle gives the trained model's rewards."""
