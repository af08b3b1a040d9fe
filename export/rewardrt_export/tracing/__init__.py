"""From torch modules to the float32 graph."""
