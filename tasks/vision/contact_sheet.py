"""Some images and their transformed copies, side by side."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image

from seqba.repeat import unfold
from tasks.vision.augment import Views
from tasks.vision.pipelines import Pipeline

_IMAGES, _COPIES = 4, 10
_LEAST_SIDE = 96  # in pixels; smaller images are enlarged, pixel by pixel


def draw_contact_sheet(file: Path, pipeline: Pipeline, views: Views, copies: tuple[int, ...]) -> None:
    """Write a picture: a row an image, first as it is, then its copies, ten at most; no epoch trains on these."""
    shown = copies[:_COPIES]
    batch = pipeline.first(_IMAGES, epoch=-1)
    transformed = unfold(_visible(pipeline.transformed(batch, shown), views).cpu(), len(shown))
    plain = (
        torch.stack([views.evaluation(pipeline.images[n]["image"]) for n in batch["keys"][:, 2].tolist()]).float() / 255
    )
    rows = torch.cat([plain[None], transformed]).transpose(0, 1).flatten(0, 1)
    times = math.ceil(_LEAST_SIDE / rows.shape[-1])
    rows = rows.repeat_interleave(times, 2).repeat_interleave(times, 3)
    save_image(make_grid(rows, nrow=1 + len(shown), pad_value=1), file)


def _visible(images: Tensor, views: Views) -> Tensor:
    """Normalised images as pixels from 0 to 1."""
    mean, std = (torch.tensor(x, device=images.device).view(-1, 1, 1) for x in (views.mean, views.std))
    return (images.float() * std + mean).clamp(0, 1)
