"""Images by number, decoded when they are asked for, or all of them as one tensor."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from tasks.cli.errors import DataError

logger = logging.getLogger(__name__)

_SHOWN = 5  # reasons in a message
_LARGEST = 2**31  # bytes of images that are kept decoded


class ImageSet:
    """One split: {"image": (3, H, W) uint8, "label": int} by index.

    Args:
        items: what `decode` turns into an image: files, rows of a data set, or images that are one tensor
            (N, 3, H, W).
        labels: (N,), int64.
        decode: item -> image; None for a tensor.
        names: of the items, for messages and the fingerprint; None for a tensor.
    """

    def __init__(
        self,
        items: Any,
        labels: Tensor,
        decode: Callable[[Any], Tensor] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.items, self.labels, self.decode, self.names = items, labels, decode, names

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image and its class."""
        try:
            return {"image": self._image(index), "label": int(self.labels[index])}
        except DataError as error:
            raise DataError(
                f"{error}; replace it and go on with --resume, or begin anew with --on-corrupt skip"
            ) from error

    def _image(self, index: int) -> Tensor:
        item = self.items[index]
        return item if self.decode is None else self.decode(item)

    @property
    def tensor(self) -> Tensor | None:
        """All images, (N, 3, H, W) uint8, where they are kept so."""
        return self.items if self.decode is None else None

    def subset(self, indices: Tensor) -> ImageSet:
        """Some of the images, in the order of `indices`."""
        chosen = indices.tolist()
        items = self.items[indices] if self.decode is None else _take(self.items, chosen)
        names = None if self.names is None else [self.names[i] for i in chosen]
        return ImageSet(items, self.labels[indices], self.decode, names)

    def decodable(self) -> ImageSet:
        """Those that can be decoded, all of which are; how many cannot be is said, with some reasons."""
        faults = self.faults()
        bad = [fault for fault in faults if fault]
        if bad:
            logger.info(f"{len(bad):,} images are left out: {_some(bad)}")
        return self.subset(torch.tensor([n for n, fault in enumerate(faults) if not fault], dtype=torch.int64))

    def faults(self, num_workers: int = 0) -> list[str]:
        """Why each image cannot be decoded, in as many processes; empty where it can be."""
        loader: DataLoader[Any] = DataLoader(_Faults(self), 64, num_workers=num_workers, collate_fn=list)  # type: ignore[arg-type]
        return [fault for batch in loader for fault in batch]

    def refuse_damaged(self, called: str, num_workers: int = 0) -> None:
        """Decode every image once.

        Raises:
            DataError: some cannot be, how many, and why.
        """
        if self.decode is not None and (bad := [fault for fault in self.faults(num_workers) if fault]):
            raise DataError(
                f"{len(bad):,} of the {called} images cannot be decoded: {_some(bad)}; replace them, or give "
                "--on-corrupt skip"
            )

    def in_memory(self, called: str) -> ImageSet:
        """The same as one tensor.

        Raises:
            DataError: images cannot be decoded, are of several sizes, or too many to be kept.
        """
        if self.decode is None or not len(self):
            return self
        self.refuse_damaged(called)
        images: list[Tensor] = []
        for index in range(len(self)):
            images.append(self._image(index))
            (height, width), (first_height, first_width) = images[-1].shape[1:], images[0].shape[1:]
            if images[-1].shape != images[0].shape:
                raise DataError(
                    f"the {called} images are of several sizes, {first_height} x {first_width} and {height} x {width} "
                    "for two; give --image-size"
                )
            if len(self) * images[0].numel() > _LARGEST:
                raise DataError(
                    f"{len(self):,} {called} images of {height} x {width} are too many to be kept decoded; give "
                    "--image-size, with which they are read as they are needed"
                )
        return ImageSet(torch.stack(images), self.labels)

    def update(self, digest: Any) -> None:
        """Add what the split holds to a hash: pixels of a tensor, else the items' names; and all labels."""
        digest.update(self.labels.numpy().tobytes())
        if self.decode is None:
            digest.update(self.items.numpy().tobytes())
        for name in self.names or ():
            digest.update(name.encode() + b"\0")


class _Faults:
    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        try:
            self.images._image(index)
        except DataError as error:
            return str(error)
        return ""


def _some(reasons: Sequence[str]) -> str:
    return "; ".join(reasons[:_SHOWN]) + (" ..." if reasons[_SHOWN:] else "")


def stratified(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut indices into `count` drawn ones and the rest, both in order; each class gives its share, to the image.

    >>> some, rest = stratified(torch.tensor([0, 0, 0, 0, 1, 1]), count=3, seed=0)
    >>> torch.tensor([0, 0, 0, 0, 1, 1])[some].tolist()
    [0, 0, 1]
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[labels[order].sort(stable=True).indices]
    # place i of n in its class comes at (i + 1/2) / n: the first `count` places hold each class by its share
    sizes = torch.bincount(labels)
    place = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[labels[by_class]]
    share = (place + 0.5) / sizes[labels[by_class]]
    first = by_class[share.sort(stable=True).indices]
    return first[:count].sort().values, first[count:].sort().values


def fingerprint(splits: Sequence[ImageSet]) -> str:
    """A name of the content of some splits."""
    digest = hashlib.blake2b(digest_size=16)
    for split in splits:
        split.update(digest)
    return digest.hexdigest()


def _take(items: Any, chosen: list[int]) -> Any:
    return items.select(chosen) if hasattr(items, "select") else [items[i] for i in chosen]
