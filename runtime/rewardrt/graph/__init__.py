"""One ONNX graph: which files it may read, and the graph loaded and ready to run."""
