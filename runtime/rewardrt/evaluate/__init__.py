"""How good a reward model is: benchmarks as they are distributed, numbers with their doubt, a report."""
