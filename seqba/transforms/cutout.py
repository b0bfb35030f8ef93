"""Cutout: a square of every image is blank."""

from __future__ import annotations

import torch
from torch import Tensor

from seqba.transforms.batched import BatchTransform


class Cutout(BatchTransform):
    """Fill a square whose centre is drawn from all pixels; what of it lies outside of the image is lost.

    DeVries and Taylor 2017, "Improved Regularization of Convolutional Neural Networks with Cutout": behind `Normalize`,
    where 0 is the mean colour.

    Args:
        size: side of the square in pixels, at least 1.
        fill: its value.

    Raises:
        ValueError: a size below 1.
    """

    num_draws = 2

    def __init__(self, size: int, fill: float = 0.0) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size, self.fill = size, fill

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Images (N, C, H, W); uniform (N, 2) says where the centre is, down and to the right."""
        down, right = (
            self._covered(drawn, images.shape[axis]) for axis, drawn in enumerate(uniform.unbind(1), start=2)
        )
        return images.masked_fill((down[:, :, None] & right[:, None, :])[:, None], self.fill)

    def _covered(self, drawn: Tensor, length: int) -> Tensor:
        """Which pixels of an axis the square covers, (N, length)."""
        first = (drawn * length).long()[:, None] - self.size // 2
        places = torch.arange(length, device=drawn.device)
        return (places >= first) & (places < first + self.size)
