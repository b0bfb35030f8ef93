"""A transform of single images, such as torchvision's, on batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqba.draws.generators import keyed_generators
from seqba.transforms.batched import BatchTransform


class EachImage(BatchTransform):
    """Call a transform of one image on each image of a batch: RandAugment, AutoAugment, random resized crops.

    Inside, torch (on CPU), Python and numpy draw from a key of the image's own, and go on after it as before.

    Args:
        transform: image (C, H, W) -> an image, all of one size, as torchvision's `v2` transforms are.

    >>> from torchvision.transforms import v2
    >>> EachImage(v2.RandomResizedCrop(8))(torch.rand(4, 3, 16, 16)).shape
    torch.Size([4, 3, 8, 8])
    """

    num_draws = 2

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Images (N, C, H, W); uniform (N, 2), in steps of 2^-24, is each image's key."""
        made = []
        for image, key in zip(images, (uniform.double() * 2**24).long().tolist(), strict=True):
            with keyed_generators(*key):
                made.append(self.transform(image))
        return torch.stack(made)
