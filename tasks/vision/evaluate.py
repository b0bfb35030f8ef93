"""Top-1 accuracy and loss of a split: every image once, without T."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

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
    seen: Any = Subset(_Seen(images, views), mine)  # type: ignore[arg-type]
    loader: DataLoader[Any] = DataLoader(seen, batch_size, num_workers=num_workers)
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    loss_model.eval()
    for pixels, labels in loader:
        batch = {"images": views.normalize(pixels.to(accelerator.device)), "labels": labels.to(accelerator.device)}
        with accelerator.autocast():
            nats, correct = loss_model(batch)
        sums += torch.stack([nats, correct]).double()
    loss_model.train()
    loss, accuracy = (accelerator.reduce(sums, "sum") / len(images)).tolist()
    return {f"{split}_loss": loss, f"{split}_accuracy": accuracy}


class _Seen:
    """Images as an evaluation sees them, with their labels."""

    def __init__(self, images: ImageSet, views: Views) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        sample = self.images[index]
        return self.views.evaluation(sample["image"]), sample["label"]
