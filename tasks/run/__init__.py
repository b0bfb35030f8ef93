"""Code that all training loops share: the loop, its folder, checkpoints, log and streams of batches."""
