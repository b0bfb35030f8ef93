"""seqba: Batch Augmentation for sequence models (Hoffer et al. 2020, "Augment Your Batch")."""
