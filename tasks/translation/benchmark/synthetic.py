"""An update on one batch of random ids, for what does not depend on text; and the peak of its memory.

A peak is measured in a process of its own: python -m tasks.translation.benchmark.synthetic PLAN.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqba.step import TrainStep
from tasks.benchmark.memory import measure_peak
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.models.transformer import build_model
from tasks.translation.model import TranslationLoss, count_labels, summed_loss


@dataclass(frozen=True)
class Plan:
    """An update of B = `num_samples` pairs of `length` pieces on both sides, by a Transformer of that many layers.

    `lean` is the loss that never holds all logits.
    """

    num_copies: int
    copies_per_pass: int
    num_samples: int = 40
    length: int = 24
    vocab_size: int = 8_000
    width: int = 256
    num_layers: int = 3
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
    sizes = {name: getattr(plan, name) for name in ("vocab_size", "width", "num_layers")}
    model = build_model(**sizes, num_heads=4, pad_token_id=0, eos_token_id=1, max_length=plan.length)
    loss_model = (TranslationLoss if plan.lean else PlainLoss)(model, 0.1).train()
    optimizer = torch.optim.Adam(loss_model.parameters(), lr=1e-5, fused=True)
    wrapped, optimizer = accelerator.prepare(loss_model, optimizer)
    copies: Any = {name: getattr(plan, name) for name in ("num_copies", "copies_per_pass", "copy_seed")}
    step = TrainStep(accelerator, wrapped, optimizer, loss_fn=summed_loss, count_fn=count_labels, **copies)
    ids, labels = torch.randint(
        3, plan.vocab_size, (2, plan.num_samples, plan.length), generator=torch.Generator().manual_seed(0)
    )
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "decoder_input_ids": labels.roll(1, dims=1),
    }
    batch = {name: x.to(accelerator.device) for name, x in batch.items()}
    return lambda: float(step([batch], update=1).loss)


if __name__ == "__main__":
    print(measure_peak(update_of, Plan(**json.loads(sys.argv[1]))))
