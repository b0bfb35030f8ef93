"""Where T runs: on the device, on whole batches, or in the loader's processes, image by image.

Both key every draw by (seed, epoch, sample, copy): a copy of an image is the same whatever its batch, plan, rank or
worker, and whether the run was resumed. An image is read and decoded once an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks.run.stream import SampleKey

Batch = dict[str, Tensor]


class Pipeline(Protocol):
    """What a stream of batches and a training step ask: a batch of B images, and then the copies of one pass."""

    dataset: Any  # images by index, for `BatchStream`

    def load(self, sample: Any, key: SampleKey) -> Any:
        """What becomes of a sample in the loader."""

    def collate(self, samples: Sequence[Any]) -> Batch:
        """What `load` returned, as a batch with `labels` (B,)."""

    def take_copies(self, batch: Batch, copies: tuple[int, ...]) -> Batch:
        """`images` (rows, C, H, W) and `labels` (rows,) of some copies, copy-major."""


class DevicePipeline:
    """A data set that lies on the device as one tensor; a batch is the numbers of its images.

    Args:
        images: (N, C, H, W) uint8, on the device.
        labels: (N,), on the host.
        transform: (images (rows, C, H, W), keys (rows, 4)) -> the transformed images.
        seed: of T.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Tensor, Tensor], Tensor], seed: int
    ) -> None:
        self.images, self.labels, self.transform, self.seed = images, labels, transform, seed
        self.dataset = range(len(images))

    def load(self, sample: int, key: SampleKey) -> SampleKey:
        """The sample's key, which has its number."""
        return key

    def collate(self, samples: Sequence[SampleKey]) -> Batch:
        """`labels`, `numbers` and `epochs`, each (B,)."""
        numbers = torch.tensor([key.sample for key in samples])
        return {
            "labels": self.labels[numbers],
            "numbers": numbers,
            "epochs": torch.tensor([key.epoch for key in samples]),
        }

    def take_copies(self, batch: Batch, copies: tuple[int, ...]) -> Batch:
        """The transformed images of some copies."""
        labels, numbers, epochs = (batch[name].repeat(len(copies)) for name in ("labels", "numbers", "epochs"))
        copy = torch.tensor(copies, device=labels.device).repeat_interleave(len(batch["labels"]))
        keys = torch.stack([torch.full_like(copy, self.seed), epochs, numbers, copy], 1)
        return {"images": self.transform(self.images[numbers], keys), "labels": labels}


class WorkerPipeline:
    """Images that are decoded, and transformed M times, where the loader collates.

    Args:
        dataset: {"image": (C, H, W) uint8, "label": int} by index.
        transform: image -> transformed image, all of one size, drawing from torch's global generator.
        copies: of this rank.
        finish: (images (rows, C, H, W)) -> images, on the device.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable[[Tensor], Tensor],
        copies: Sequence[int],
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        self.dataset, self.transform, self.copies, self.finish = dataset, transform, tuple(copies), finish

    def load(self, sample: dict[str, Any], key: SampleKey) -> dict[str, Any]:
        """The copies of a sample, `images` (M, C, H, W), each under its own draws."""
        images = []
        for copy in self.copies:
            with key.generators(copy):
                images.append(self.transform(sample["image"]))
        return {"images": torch.stack(images), "labels": sample["label"]}

    def collate(self, samples: Sequence[dict[str, Any]]) -> Batch:
        """`images` (M, B, C, H, W) and `labels` (B,)."""
        return {
            "images": torch.stack([sample["images"] for sample in samples], 1),
            "labels": torch.tensor([sample["labels"] for sample in samples]),
        }

    def take_copies(self, batch: Batch, copies: tuple[int, ...]) -> Batch:
        """The images of some copies."""
        images = batch["images"]
        if copies != self.copies:
            images = images[[self.copies.index(copy) for copy in copies]]
        return {"images": self.finish(images.flatten(0, 1)), "labels": batch["labels"].repeat(len(copies))}
