"""Where T runs: on the device, on whole batches, or in the loader's processes, image by image.

Both key every draw by (seed, epoch, sample, copy): a copy of an image is the same whatever its batch, plan, rank or
worker, and whether the run was resumed. An image is read and decoded once an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from seqba.repeat import keys_of_rows
from seqba.transforms import BatchTransform, Mixup, mix_rows
from tasks.run.stream import SampleKey
from tasks.vision.data.image_set import ImageSet

Batch = dict[str, Any]


class Pipeline:
    """What a stream of batches and a training step ask for: batches of B images, and then the copies of one pass.

    Args:
        images: of the training split.
        seed: of T.
        mixup: mixes the copies of a pass.
        device: of the network.
    """

    dataset: Any  # for `BatchStream`: what `load` takes, by index

    def __init__(self, images: ImageSet, seed: int, mixup: Mixup | None, device: torch.device) -> None:
        self.images, self.seed, self.mixup, self.device = images, seed, mixup, device

    def load(self, sample: Any, key: SampleKey) -> tuple[SampleKey, Any]:
        """What becomes of a sample in the loader: its key, and its copies where they are made there."""
        raise NotImplementedError

    def collate(self, samples: Sequence[tuple[SampleKey, Any]]) -> Batch:
        """`labels` (B,) and `keys` (B, 3) of B samples, and `first_key`, that of the first in numbers."""
        keys = torch.tensor([key for key, _ in samples])
        return {"labels": self.images.labels[keys[:, 2]], "keys": keys, "first_key": tuple(samples[0][0])}

    def first(self, count: int, epoch: int) -> Batch:
        """A batch of the first images of the set, on the device."""
        numbers = range(min(count, len(self.images)))
        batch = self.collate([self.load(self.dataset[n], SampleKey(self.seed, epoch, n)) for n in numbers])
        return send_to_device(batch, self.device)

    def transformed(self, batch: Batch, copies: tuple[int, ...]) -> Tensor:
        """The images of some copies under T, (K*B, C, H, W), copy-major."""
        raise NotImplementedError

    def take_copies(self, batch: Batch, copies: tuple[int, ...]) -> Batch:
        """The rows of a pass, copy-major: `images` and `labels`, and what mixup adds.

        A batch with a `layer` keeps its images: they are mixed in front of that layer, by `VisionLoss`.
        """
        images, labels = self.transformed(batch, copies), batch["labels"].repeat(len(copies))
        if self.mixup is None:
            return {"images": images, "labels": labels}
        partners, shares = self.mixup.draw(len(batch["labels"]), copies, batch["first_key"])
        partners, shares = partners.to(labels.device), shares.to(images)
        rows = {"images": images, "labels": labels, "partner_labels": labels[partners], "proportions": shares}
        if "layer" in batch:
            return {**rows, "partners": partners, "layer": batch["layer"]}
        return {**rows, "images": mix_rows(images, partners, shares)}


class DevicePipeline(Pipeline):
    """All images lie on the device, and T works on whole batches there; the loader hands out numbers."""

    def __init__(
        self, images: ImageSet, seed: int, mixup: Mixup | None, device: torch.device, transform: BatchTransform
    ) -> None:
        super().__init__(images, seed, mixup, device)
        assert images.tensor is not None
        self.dataset, self.transform, self.pixels = range(len(images)), transform, images.tensor.to(device)

    def load(self, sample: int, key: SampleKey) -> tuple[SampleKey, None]:
        """Nothing but the key."""
        return key, None

    def transformed(self, batch: Batch, copies: tuple[int, ...]) -> Tensor:
        """Drawn by the rows' keys."""
        keys = keys_of_rows(batch["keys"], copies)
        return self.transform(self.pixels[keys[:, 2]], keys)


class WorkerPipeline(Pipeline):
    """Images are decoded, and transformed once for each of this rank's copies, in the loader.

    Args:
        images, seed, mixup, device: as of `Pipeline`.
        transform: image (3, H, W) uint8 -> an image of one size, drawing from torch's global generator.
        copies: of this rank.
        finish: images (rows, C, H, W) -> images, on the device.
    """

    def __init__(
        self,
        images: ImageSet,
        seed: int,
        mixup: Mixup | None,
        device: torch.device,
        transform: Callable[[Tensor], Tensor],
        copies: Sequence[int],
        finish: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(images, seed, mixup, device)
        self.dataset, self.transform, self.copies, self.finish = images, transform, tuple(copies), finish

    def decode(self, sample: dict[str, Any], key: SampleKey) -> tuple[SampleKey, Tensor]:
        """An image as it is: where a group's first rank reads for all, each rank transforms its own copies."""
        return key, sample["image"]

    def collate_decoded(self, samples: Sequence[tuple[SampleKey, Tensor]]) -> Batch:
        """Beside the labels, `decoded`, a list of B images of any sizes."""
        return {**super().collate(samples), "decoded": [image for _, image in samples]}

    def receive(self, batch: Batch) -> Batch:
        """The views of a batch of `collate_decoded`, as `collate` has them."""
        pairs = zip(batch.pop("decoded"), batch["keys"].tolist(), strict=True)
        views = [self.load({"image": image}, SampleKey(*key))[1] for image, key in pairs]
        return {**batch, "views": torch.stack(views, 1)}

    def load(self, sample: dict[str, Any], key: SampleKey) -> tuple[SampleKey, Tensor]:
        """The copies of an image, (M, C, H, W), each under its own draws."""
        views = []
        for copy in self.copies:
            with key.generators(copy):
                views.append(self.transform(sample["image"]))
        return key, torch.stack(views)

    def collate(self, samples: Sequence[tuple[SampleKey, Tensor]]) -> Batch:
        """Beside the labels, `views` (M, B, C, H, W)."""
        return {**super().collate(samples), "views": torch.stack([views for _, views in samples], 1)}

    def transformed(self, batch: Batch, copies: tuple[int, ...]) -> Tensor:
        """Those of the views that are asked for."""
        views = batch["views"]
        if copies != self.copies:
            views = views[[self.copies.index(copy) for copy in copies]]
        return self.finish(views.flatten(0, 1))
