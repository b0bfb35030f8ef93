"""Models of transformers: made new, loaded with every fault found first, and audited."""
