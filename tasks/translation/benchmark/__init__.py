"""What the translation task costs, as ratios of two things measured in turn within one run."""
