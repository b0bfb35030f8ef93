"""An update on one batch of random ids, for what does not depend on text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from seqba.step import TrainStep
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.models.transformer import build_model
from tasks.translation.model import TranslationLoss, count_labels, summed_loss


@dataclass(frozen=True)
class Shape:
    """B sentence pairs of `length` pieces on both sides, in a Transformer of `num_layers` and `num_layers` layers."""

    num_samples: int = 40
    length: int = 24
    vocab_size: int = 8_000
    width: int = 256
    num_layers: int = 3


@dataclass(frozen=True)
class Plan:
    """An update; `lean` is the loss that never holds all logits."""

    num_copies: int
    copies_per_pass: int
    shape: Shape
    lean: bool = True
    copy_seed: int | None = None
    mixed_precision: str = "no"
    cpu: bool = False


class PlainLoss(TranslationLoss):
    """The same loss on all logits at once, as torch's cross-entropy is used by everybody."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed nats; `batch` as `TranslationLoss` takes it."""
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits.float()
        return F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", label_smoothing=self.label_smoothing
        )


def update_of(plan: Plan) -> Callable[[], float]:
    """A function that does one update of the training step, and returns its loss when the device has finished."""
    accelerator = start_accelerator(MachineOptions(plan.mixed_precision, plan.cpu), seed=0)
    shape = plan.shape
    model = build_model(
        vocab_size=shape.vocab_size,
        width=shape.width,
        num_layers=shape.num_layers,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=1,
        max_length=shape.length,
    )
    loss_model = (TranslationLoss if plan.lean else PlainLoss)(model, 0.1).train()
    optimizer = torch.optim.Adam(loss_model.parameters(), lr=1e-5, fused=True)
    wrapped, optimizer = accelerator.prepare(loss_model, optimizer)
    step = TrainStep(
        accelerator,
        wrapped,
        optimizer,
        loss_fn=summed_loss,
        count_fn=count_labels,
        num_copies=plan.num_copies,
        copies_per_pass=plan.copies_per_pass,
        copy_seed=plan.copy_seed,
    )
    batch = {name: x.to(accelerator.device) for name, x in _batch(shape).items()}
    return lambda: float(step([batch], update=1).loss)


def _batch(shape: Shape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (shape.num_samples, shape.length)
    ids = torch.randint(3, shape.vocab_size, size, generator=generator)
    labels = torch.randint(3, shape.vocab_size, size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "decoder_input_ids": labels.roll(1, dims=1),
    }
