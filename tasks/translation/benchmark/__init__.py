"""What the translation task costs: ratios of speed and of memory, and the share of time spent waiting for data."""
