"""One ONNX graph: what its file may hold, and the file loaded and ready to run."""
