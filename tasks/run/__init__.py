"""What every training loop of ours shares: the loop, its folder, checkpoints, log and streams of batches."""
