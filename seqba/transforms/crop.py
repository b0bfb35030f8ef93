"""Random crops of padded images."""

from __future__ import annotations

import torch
from torch import Tensor

from seqba.transforms.batched import BatchTransform


class RandomCrop(BatchTransform):
    """Pad with zeros on all sides, and cut a window of the image's own size, or of `size`, at a random place.

    Args:
        padding: pixels on each side, at least 0.
        size: (height, width) of the window, or one number for both; by default those of the image.

    Raises:
        ValueError: a negative padding or a size below 1; where it is applied, a window larger than the padded image.
    """

    num_draws = 2

    def __init__(self, padding: int = 0, size: int | tuple[int, int] | None = None) -> None:
        if padding < 0:
            raise ValueError(f"padding must be at least 0, got {padding}")
        self.padding = padding
        self.size = (size, size) if isinstance(size, int) else size
        if self.size is not None and min(self.size) < 1:
            raise ValueError(f"size must be at least 1, got {size}")

    def apply(self, images: Tensor, uniform: Tensor) -> Tensor:
        """Windows (N, C, height, width); uniform (N, 2) says how far down and to the right."""
        for axis, drawn in enumerate(uniform.unbind(1), start=2):
            images = self._cut(images, drawn, axis)
        return images

    def _cut(self, images: Tensor, drawn: Tensor, axis: int) -> Tensor:
        length = images.shape[axis]
        window = length if self.size is None else self.size[axis - 2]
        room = length + 2 * self.padding - window
        if room < 0:
            raise ValueError(
                f"a window of {window} pixels does not fit into {length} pixels with {self.padding} on each side"
            )
        first = (drawn * (room + 1)).long() - self.padding
        places = first[:, None] + torch.arange(window, device=images.device)
        outside = (places < 0) | (places >= length)
        shape = [len(images), 1, 1, 1]
        shape[axis] = window
        expanded = list(images.shape)
        expanded[axis] = window
        cut = images.gather(axis, places.clamp(0, length - 1).view(shape).expand(expanded))
        return cut.masked_fill_(outside.view(shape), 0) if self.padding else cut
