"""The cost of the translation task: ratios of speed and of memory, and the share of time spent waiting for data."""
