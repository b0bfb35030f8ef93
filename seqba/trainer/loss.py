"""What a Trainer's loss is divided by, found by asking it, and what makes it a part of one mean over the update.

The Trainer hands every loss the number of targets of the whole update, `num_items_in_batch`. Some losses divide by
it (GPT-2, Llama). Others take it and do not look at it: Marian, BART, T5 and most encoder-decoders of transformers
5.23, BERT's classifiers, whose gradient then grows with the accumulation steps and the ranks. No name tells which, and
releases differ, so the loss itself is asked, once, on the first batch: in eval mode, without gradients, with all
random states put back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from seqba.repeat import count_samples
from seqba.trainer.batch import SAMPLES, SHIFTED_TARGETS, TARGETS, count_items, take_rows

_EXACT = 1e-5  # relative; the same numbers, divided by another power of two
_ALIKE = 1e-3  # relative; the same rows in another batch
_SIMILAR = 2e-2  # the same in half precision
_CUTS = 64  # of a batch, that are tried


class Divisor(Enum):
    """What a loss divides its sum by."""

    UPDATE = "num_items_in_batch"  # the targets of the whole update, as the Trainer asks
    PASS = "the targets of its own rows"  # a mean, whatever the rest of the update holds
    BOTH = "each in part"  # a sum over num_items_in_batch, plus a mean (an auxiliary loss)


class Rows(Enum):
    """What the gradient becomes when every row is there twice."""

    INDEPENDENT = "the same"
    SUMMED = "twice as large"
    COMPARED = "another"  # rows are set against each other: in-batch negatives, pairs
    UNKNOWN = "not seen"  # no gradient yet, random in eval mode too, or not looked at


@dataclass(frozen=True)
class LossForm:
    """How a loss becomes a part of an update's mean.

    Attributes:
        divisor: what it divides by.
        rows: whether copies may stand in one pass.
        target: what its mean is over: SAMPLES, TARGETS or SHIFTED_TARGETS of `count_items`; None where that is not
            certain, so that each batch counts alike, as under a plain Trainer.
        ignored: a label beside -100 that is no target (255 of segmentation, a pad id), or None.
    """

    divisor: Divisor
    rows: Rows
    target: int | None
    ignored: int | None = None


class LossOf(Protocol):
    """The loss of some rows, as a number, under the same random draws at each call."""

    def __call__(self, rows: Any, num_items: Any) -> Tensor:
        """0-dim, on the device, without a gradient."""


def measure_loss(
    loss_of: LossOf,
    batch: Mapping[str, Any],
    num_items: Tensor | int | None,
    *,
    rows: Rows,
    total: Callable[[Tensor], Tensor],
    may_ignore: Sequence[int] = (),
) -> LossForm | None:
    """Find the form of a loss on one batch.

    A loss that divides by `num_items_in_batch` halves when that is doubled. What a mean is over shows where the batch
    is cut in two: the means of the parts, weighted by what they hold of it, give the mean of the whole.

    Args:
        loss_of: computes it; it is never given a label that the batch does not hold.
        batch: unrepeated.
        num_items: as the Trainer gives it; None where it gives none.
        rows: what `compare_rows` has found.
        total: sums a tensor over the ranks, so that all of them come to the same form.
        may_ignore: labels that may be no targets.

    Returns:
        None where this batch says nothing (no targets, or a loss of zero).
    """
    doubled = None if num_items is None else 2 * num_items
    first = loss_of(batch, num_items)
    losses = [first, first if doubled is None else loss_of(batch, doubled)]
    loss, over_doubled = total(torch.stack(losses).nan_to_num(0.0, 0.0, 0.0)).tolist()
    if loss == 0:
        return None
    divisor = _divisor(loss, over_doubled, num_items)
    guess = _target(loss_of, batch, num_items, total)
    if divisor is not Divisor.PASS:
        return LossForm(divisor, rows, guess)
    return LossForm(divisor, rows, *_mean_over(loss_of, batch, guess, may_ignore, total))


def compare_rows(
    one: Sequence[Tensor | None],
    under_other_draws: Sequence[Tensor | None],
    of_twice: Sequence[Tensor | None],
    *,
    total: Callable[[Tensor], Tensor],
) -> Rows:
    """What a loss does with its rows, by its gradient over a batch and over the batch in which each row is there twice.

    Each argument is the loss and the gradients. Neither tells alone: at its start a loss over pairs is log 2 whatever
    stands in them, and equal siblings among the negatives move a loss by a constant.
    """
    if not one:
        return Rows.UNKNOWN
    by_value, by_gradient = (
        _compare(*parts, total=total)
        for parts in ((one[:1], under_other_draws[:1], of_twice[:1]), (one[1:], under_other_draws[1:], of_twice[1:]))
    )
    if by_gradient is Rows.UNKNOWN or by_value is by_gradient or by_value is Rows.UNKNOWN:
        return by_gradient
    return Rows.COMPARED


def _compare(
    gradient: Sequence[Tensor | None],
    under_other_draws: Sequence[Tensor | None],
    of_twice: Sequence[Tensor | None],
    *,
    total: Callable[[Tensor], Tensor],
) -> Rows:
    found = [_distances(*tensors) for tensors in zip(gradient, under_other_draws, of_twice, strict=True)]
    distances = torch.stack(found).sum(0) if found else torch.zeros(4, dtype=torch.float64)
    size, redrawn, from_one, from_two = total(distances.nan_to_num(0.0, 0.0, 0.0)).tolist()
    half = any(a is not None and a.dtype in (torch.float16, torch.bfloat16) for a in gradient)
    half = half or any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
    tolerance = (_SIMILAR if half else _ALIKE) ** 2 * size
    if size == 0 or redrawn > tolerance:
        return Rows.UNKNOWN
    if from_one <= tolerance:
        return Rows.INDEPENDENT
    return Rows.SUMMED if from_two <= 4 * tolerance else Rows.COMPARED


def _distances(a: Tensor | None, redrawn: Tensor | None, twice: Tensor | None) -> Tensor:
    """The squared size of a gradient, and its squared distances from another, from that of twice the rows, its half."""
    present = next((x for x in (a, redrawn, twice) if x is not None), None)
    if present is None:
        return torch.zeros(4, dtype=torch.float64)
    one, other, two = (torch.zeros_like(present) if x is None else x for x in (a, redrawn, twice))
    return torch.stack([x.double().square().sum() for x in (one, other - one, two - one, two - 2 * one)]).cpu()


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


def _mean_over(
    loss_of: LossOf, batch: Mapping[str, Any], guess: int, may_ignore: Sequence[int], total: Callable[[Tensor], Tensor]
) -> tuple[int | None, int | None]:
    """What a mean is over, and the label that is no target; None where no weights make the whole of its parts.

    The cut is the one whose parts differ most in what they hold.
    """
    size = count_samples(batch) or 0
    try:
        cuts = [(take_rows(batch, 0, n), take_rows(batch, n, size)) for n in range(1, min(size, _CUTS + 1))]
    except (TypeError, ValueError):
        return None, None
    if not cuts:  # a batch of one sample
        return guess, None
    device = next(x.device for x in batch.values() if isinstance(x, Tensor))
    labels = batch.get("labels")
    held = [v for v in may_ignore if isinstance(labels, Tensor) and bool((labels == v).any())]
    kinds = dict.fromkeys((guess, TARGETS, SHIFTED_TARGETS, SAMPLES))
    forms = [(kind, ignored) for ignored in (None, *held) for kind in kinds]
    shares = [[_share(*cut, device, *form) for form in forms] for cut in cuts]
    best = max(range(len(cuts)), key=lambda i: max(shares[i]) - min(shares[i]))
    losses = torch.stack([loss_of(rows, None) for rows in (batch, *cuts[best])])
    whole, one, other = losses.double().nan_to_num(0.0, 0.0, 0.0).unbind()
    mixed = torch.stack([share * one + (1 - share) * other for share in map(losses.new_tensor, shares[best])])
    away = total(((mixed - whole).abs() > _ALIKE * whole.abs()).double()).tolist()  # on how many ranks it does not fit
    return next((form for form, ranks in zip(forms, away, strict=True) if ranks == 0), (None, None))


def _share(one: Any, other: Any, device: torch.device, kind: int, ignored: int | None) -> float:
    """What the first part of a batch holds of it."""
    here, there = (float(count_items(rows, device, ignored)[kind]) for rows in (one, other))
    return here / max(1.0, here + there)


def _divisor(loss: float, over_doubled: float, num_items: Any) -> Divisor:
    if num_items is None or not _differ(loss, over_doubled, _EXACT):
        return Divisor.PASS
    return Divisor.BOTH if _differ(loss / 2, over_doubled, _EXACT) else Divisor.UPDATE


def _target(loss_of: LossOf, batch: Mapping[str, Any], num_items: Any, total: Callable[[Tensor], Tensor]) -> int:
    """What the loss counts as a target, by the labels that it looks at: samples, where it looks at none.

    Labels change places: along the words where they stand beside these, else among the samples.
    """
    labels, words = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.ndim < 2 or "shift_labels" in batch:
        return TARGETS
    changed = labels.roll(1, -1 if isinstance(words, Tensor) and words.shape == labels.shape else 0)
    first = torch.cat([changed[..., :1], labels[..., 1:]], dim=-1)
    others = torch.cat([labels[..., :1], changed[..., 1:]], dim=-1)
    asked = [loss_of({**batch, "labels": x}, num_items).double() for x in (labels, labels, first, others)]
    loss, again, of_first, of_others = torch.stack(asked).nan_to_num(0.0, 0.0, 0.0).unbind()
    # what is not looked at moves no bit, what is may move few: new models give all labels nearly the same loss
    noise = 2 * (again - loss).abs()
    looked = torch.stack([((x - loss).abs() > noise).double() for x in (of_first, of_others)])
    moved = torch.tensor([not torch.equal(x, labels) for x in (first, others)]).to(looked)
    first_counts, others_count, first_moved, others_moved = total(torch.cat([looked, moved])).tolist()
    if first_counts or not (first_moved and others_moved):
        return TARGETS
    return SHIFTED_TARGETS if others_count else SAMPLES


def _differ(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) > tolerance * abs(a)
