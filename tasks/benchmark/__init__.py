"""Code that all benchmarks share: ratios of two things timed in turn."""
