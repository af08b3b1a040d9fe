"""The machine at hand: its processor, the execution providers that really start, and the kernels that it can run."""
