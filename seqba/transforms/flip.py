"""Random mirror images."""

from __future__ import annotations

import torch
from torch import Tensor

from seqba.transforms.batched import BatchTransform


class RandomHorizontalFlip(BatchTransform):
    """Mirror an image, left to right, with probability p.

    Raises:
        ValueError: p outside [0, 1].
    """

    num_draws = 1

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be in [0, 1], got {p}")
        self.p = p

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Images (N, C, H, W), mirrored where uniform (N, 1) is below p."""
        return torch.where(uniform.view(-1, 1, 1, 1) < self.p, images.flip(3), images)
