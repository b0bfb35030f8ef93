"""What a Trainer's loss is divided by, found by asking it, and what makes it a part of one mean over the update.

The Trainer hands every loss the number of targets of the whole update, `num_items_in_batch`. Some losses divide by
it (GPT-2, Llama). Others take it and do not look at it: Marian, BART, T5 and most encoder-decoders of transformers
5.23, BERT's classifiers, whose gradient then grows with the accumulation steps and the ranks. No name tells which, and
releases differ, so the loss itself is asked, once, on the first batch: in eval mode, without gradients, with all
random states put back.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from seqba.loss import IGNORE_INDEX
from seqba.trainer.batch import SAMPLES, SHIFTED_TARGETS, TARGETS, take_copies

_EXACT = 1e-5  # relative; the same numbers, divided by another power of two
_SIMILAR = 2e-2  # relative; the same rows in another batch, in half precision


class Divisor(Enum):
    """What a loss divides its sum by."""

    UPDATE = "num_items_in_batch"  # the targets of the whole update, as the Trainer asks
    PASS = "the targets of its own rows"  # a mean, whatever the rest of the update holds
    BOTH = "each in part"  # a sum over num_items_in_batch, plus a mean (an auxiliary loss)


class Rows(Enum):
    """What the mean over rows becomes when every row is there twice."""

    INDEPENDENT = "the same"
    SUMMED = "twice as large"
    COMPARED = "another"  # rows are set against each other: in-batch negatives
    UNKNOWN = "not seen"  # random in eval mode too


@dataclass(frozen=True)
class LossForm:
    """How a loss becomes a part of an update's mean.

    Attributes:
        divisor: what it divides by.
        rows: whether copies may stand in one pass.
        target: what it counts as a target: SAMPLES, TARGETS or SHIFTED_TARGETS of `count_items`.
    """

    divisor: Divisor
    rows: Rows
    target: int


class LossOf(Protocol):
    """The loss of some rows, as a number, under the same random draws at each call unless `other_draws`."""

    def __call__(self, rows: Any, num_items: Any, *, other_draws: bool = False) -> Tensor:
        """0-dim, on the device, without a gradient."""


def measure_loss(
    loss_of: LossOf,
    batch: Mapping[str, Any],
    num_items: Tensor | int | None,
    *,
    may_repeat: bool,
    total: Callable[[Tensor], Tensor],
) -> LossForm | None:
    """Find the form of a loss on one batch.

    A loss that divides by `num_items_in_batch` halves when that is doubled; a mean over independent rows stays when
    every row stands there twice; a loss that predicts the next token stays when the first label of a row is another.

    Args:
        loss_of: computes it.
        batch: unrepeated.
        num_items: as the Trainer gives it; None where it gives none.
        may_repeat: whether to look at rows that stand there twice; a batch that cannot be repeated is not.
        total: sums a tensor over the ranks, so that all of them come to the same form.

    Returns:
        None where this batch says nothing (no targets, or a loss of zero).
    """
    twice = _repeated(batch) if may_repeat else None
    doubled = None if num_items is None else 2 * num_items
    first = loss_of(batch, num_items)
    losses = [
        first,
        loss_of(batch, num_items, other_draws=True),
        first if doubled is None else loss_of(batch, doubled),
        first if twice is None else loss_of(twice, doubled),
    ]
    loss, redrawn, over_doubled, of_twice = total(torch.stack(losses).nan_to_num(0.0, 0.0, 0.0)).tolist()
    if loss == 0:
        return None
    rows = Rows.UNKNOWN if _differ(loss, redrawn, _EXACT) else _rows(loss, of_twice)
    return LossForm(_divisor(loss, over_doubled, num_items), rows, _target(loss_of, batch, num_items, total))


def part_of_update(loss: Tensor, items: Tensor, all_items: Tensor, num_ranks: int) -> Tensor:
    """A mean over the `items` targets of a pass, as its part of the mean over `all_items`.

        (items / all_items) * loss * num_ranks

    as the ranks' gradients are averaged. A division by all_items / (items * num_ranks), so that where passes are
    equally large it is a division by their number, bit by bit. A pass without targets has no part.
    """
    loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
    # kept from 0 where there are no targets: `where` gives such a pass the gradient 0 times 1 / share
    share = (all_items.clamp(min=1) / (items.clamp(min=1) * num_ranks)).to(loss.dtype)
    return torch.where(items > 0, loss / share, torch.zeros_like(loss))


def _repeated(batch: Mapping[str, Any]) -> Any:
    try:
        return take_copies(batch, 2)
    except (TypeError, ValueError):
        return None


def _divisor(loss: float, over_doubled: float, num_items: Any) -> Divisor:
    if num_items is None or not _differ(loss, over_doubled, _EXACT):
        return Divisor.PASS
    return Divisor.BOTH if _differ(loss / 2, over_doubled, _EXACT) else Divisor.UPDATE


def _rows(loss: float, of_twice: float) -> Rows:
    if not _differ(loss, of_twice, _SIMILAR):
        return Rows.INDEPENDENT
    return Rows.COMPARED if _differ(2 * loss, of_twice, _SIMILAR) else Rows.SUMMED


def _target(loss_of: LossOf, batch: Mapping[str, Any], num_items: Any, total: Callable[[Tensor], Tensor]) -> int:
    """What the loss counts as a target: samples, where it does not look at the labels.

    Every label is changed where it stands: one that counts is ignored, one that is ignored counts.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2 or "shift_labels" in batch:
        return TARGETS
    changed = torch.where(labels == IGNORE_INDEX, labels.max(), IGNORE_INDEX)
    first = torch.cat([changed[..., :1], labels[..., 1:]], dim=-1)
    others = torch.cat([labels[..., :1], changed[..., 1:]], dim=-1)
    losses = torch.stack([loss_of({**batch, "labels": x}, num_items) for x in (labels, first, others)])
    loss, of_first, of_others = total(losses.nan_to_num(0.0, 0.0, 0.0)).tolist()
    if _differ(loss, of_first, _EXACT):
        return TARGETS
    return SHIFTED_TARGETS if _differ(loss, of_others, _EXACT) else SAMPLES


def _differ(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) > tolerance * abs(a)
