"""What becomes of the float32 graph in each precision."""
