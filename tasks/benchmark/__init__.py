"""What every benchmark shares: ratios of two things timed in turn."""
