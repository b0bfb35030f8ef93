"""Top-1 accuracy and loss of a split: every image once, without T."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from tasks.run.stream import SampleKey
from tasks.vision.augment import Views
from tasks.vision.data.image_set import ImageSet


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    loss_model: nn.Module,
    images: ImageSet,
    views: Views,
    batch_size: int,
    split: str,
    num_workers: int = 0,
) -> dict[str, float]:
    """Mean nats and the share of images whose label comes first; each rank scores its part of them."""
    mine = range(accelerator.process_index, len(images), accelerator.num_processes)
    seen: Any = Subset(SeenImages(images, views), mine)  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(seen, batch_size, num_workers=num_workers)
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    loss_model.eval()
    for shown, labels in loader:
        pixels = shown[:, 0]
        batch = {"images": views.normalize(pixels.to(accelerator.device)), "labels": labels.to(accelerator.device)}
        with accelerator.autocast():
            nats, correct = loss_model(batch)
        sums += torch.stack([nats, correct]).double()
    loss_model.train()
    loss, accuracy = (accelerator.reduce(sums, "sum") / len(images)).tolist()
    return {f"{split}_loss": loss, f"{split}_accuracy": accuracy}


class SeenImages:
    """Images as an evaluation sees them, with their labels: the plain view first, then random ones.

    Args:
        images, views: of a split, and of the model.
        transform: image (3, H, W) uint8 -> a random view, drawing from torch's global generator.
        count: random views of each image; their draws are keyed by (seed, image, view).
        seed: of the views.
    """

    def __init__(
        self,
        images: ImageSet,
        views: Views,
        transform: Callable[[Tensor], Tensor] = torch.clone,
        count: int = 0,
        seed: int = 0,
    ) -> None:
        self.images, self.views, self.transform, self.count, self.seed = images, views, transform, count, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(1 + count, 3, H, W), and the label."""
        sample, key = self.images[index], SampleKey(self.seed, 0, index)
        shown = [self.views.evaluation(sample["image"])]
        for view in range(self.count):
            with key.generators(view):
                shown.append(self.transform(sample["image"]))
        return torch.stack(shown), sample["label"]
