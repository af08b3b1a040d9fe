"""This machine: its processor, the execution providers that really start, and the compiled kernels that it can run."""
