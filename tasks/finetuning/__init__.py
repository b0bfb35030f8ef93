"""Training any transformers model on any data set by the Trainer, M copies of every sample in an update."""
