"""Machine translation: Transformer-base's family on parallel text, trained with Batch Augmentation."""
