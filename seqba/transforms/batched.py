"""The interface of a batch transform; several in a row; normalisation, which draws nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqba.draws.keyed import keyed_uniform


class BatchTransform:
    """A random transform of images (N, C, H, W), with parameters for each image.

    Calling it draws, and applies what was drawn:

        images = transform(images)              # from torch's generator of the images' device
        images = transform(images, keys=keys)   # keys (N, k) int64: the same for a key, whatever else is in the batch

    A class of its own says `num_draws`, how many numbers from U[0, 1) an image takes, and `apply`.
    """

    num_draws: int

    def __call__(self, images: Tensor, keys: Tensor | None = None) -> Tensor:
        """Transform each image under draws of its own; the images given are not written into.

        Args:
            images: (N, C, H, W), uint8 or floating point.
            keys: (N, k) int64, on the same device.

        Raises:
            ValueError: images of another shape, or another number of keys.
        """
        if images.ndim != 4:
            raise ValueError(f"images must have the shape (N, C, H, W), got {tuple(images.shape)}")
        if keys is None:
            return self.apply(images, torch.rand(len(images), self.num_draws, device=images.device))
        if len(keys) != len(images):
            raise ValueError(f"keys must be one for each image: {len(images)} images, {len(keys)} keys")
        return self.apply(images, keyed_uniform(keys, self.num_draws))

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """The transform under given draws: images (N, C, H, W), uniform (N, num_draws) in [0, 1)."""
        raise NotImplementedError


class Compose(BatchTransform):
    """Transforms one after the other, each with draws of its own.

    >>> from seqba.transforms import Cutout, RandomHorizontalFlip
    >>> Compose([RandomHorizontalFlip(), Cutout(8)]).num_draws
    3
    """

    def __init__(self, transforms: Sequence[BatchTransform]) -> None:
        self.transforms = list(transforms)
        self.num_draws = sum(transform.num_draws for transform in self.transforms)

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """All of them in order; each takes its columns of `uniform`."""
        sizes = [transform.num_draws for transform in self.transforms]
        for transform, own in zip(self.transforms, uniform.split(sizes, 1), strict=True):
            images = transform.apply(images, own)
        return images


class Normalize(BatchTransform):
    """Pixels to numbers of mean 0 and deviation 1 by channel: (x - mean) / std, x of uint8 images being divided by 255.

    Args:
        mean: of each channel, where white is 1.
        std: of each channel, above 0.
        dtype: of the result; float32 by default.

    Raises:
        ValueError: other numbers of means and deviations, or a deviation that is not above 0.
    """

    num_draws = 0

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32) -> None:
        if len(mean) != len(std) or not all(value > 0 for value in std):
            raise ValueError(f"mean and std must be one a channel, std above 0, got {list(mean)} and {list(std)}")
        self.mean, self.std, self.dtype = list(mean), list(std), dtype

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """The images in `dtype`; nothing is drawn."""
        white = 255.0 if images.dtype == torch.uint8 else 1.0
        scale = torch.tensor([1 / (white * std) for std in self.std], dtype=self.dtype, device=images.device)
        shift = torch.tensor(
            [-mean / std for mean, std in zip(self.mean, self.std, strict=True)], dtype=self.dtype, device=images.device
        )
        return torch.addcmul(shift.view(-1, 1, 1), images.to(self.dtype), scale.view(-1, 1, 1))
