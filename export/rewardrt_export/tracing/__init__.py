"""From torch modules to the float32 graph that is written."""
