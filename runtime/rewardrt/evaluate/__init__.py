"""How good a reward model is: published benchmarks, scores with confidence intervals, a report."""
