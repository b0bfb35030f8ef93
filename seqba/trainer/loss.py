"""What a Trainer's loss is divided by, found by asking it, and what makes it a part of one mean over the update.

The Trainer hands every loss the number of targets of the whole update, `num_items_in_batch`. Some losses divide by
it (GPT-2, Llama). Others take it and do not look at it: Marian, BART, T5 and most encoder-decoders of transformers
5.23, BERT's classifiers, whose gradient then grows with the accumulation steps and the ranks. No name tells which, and
releases differ, so the loss itself is asked, once, on the first batch: in eval mode, without gradients, with all
random states put back.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor

from seqba.repeat import count_samples
from seqba.trainer.batch import SAMPLES, SHIFTED_TARGETS, TARGETS, count_items, take_rows

logger = logging.getLogger(__name__)

_EXACT = 1e-5  # relative; the same numbers, divided by another power of two
ALIKE = 1e-3  # relative; the same rows in another batch
SIMILAR = 2e-2  # the same in half precision
_CUTS = 64  # of a batch, that are tried


class Divisor(Enum):
    """The denominator of a loss."""

    UPDATE = "num_items_in_batch"  # the targets of the whole update, as the Trainer asks
    PASS = "the targets of its own rows"  # a mean, whatever the rest of the update holds
    BOTH = "each in part"  # a sum over num_items_in_batch, plus a mean (an auxiliary loss)


class Rows(Enum):
    """How the gradient changes when every row stands in the batch twice."""

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
    shadow_of: LossOf,
    batch: Mapping[str, Any],
    num_items: Tensor | int | None,
    *,
    rows: Rows,
    total: Callable[[Tensor], Tensor],
    may_ignore: Sequence[int] = (),
    tolerance: float = ALIKE,
) -> LossForm | None:
    """Find the form of a loss on one batch.

    A loss that divides by `num_items_in_batch` halves when that is doubled. What a mean is over shows where the batch
    is cut in two: the means of the parts, weighted by what they hold of it, give the mean of the whole. So do their
    gradients, which tell parts apart where a new model gives all of them nearly the same loss.

    Args:
        loss_of: computes it; it is never given a label that the batch does not hold.
        shadow_of: the loss, and its gradient's products with some fixed directions: (n,).
        batch: unrepeated.
        num_items: as the Trainer gives it; None where it gives none.
        rows: what `compare_rows` has found.
        total: sums a tensor over the ranks, so that all of them come to the same form.
        may_ignore: labels that may be no targets.
        tolerance: what rounding may move, relatively: ALIKE, or SIMILAR in half precision.

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
    return LossForm(divisor, rows, *_mean_over(shadow_of, batch, guess, may_ignore, total, tolerance))


def compare_rows(
    one: Sequence[Tensor | None],
    under_other_draws: Sequence[Tensor | None],
    of_twice: Sequence[Tensor | None],
    *,
    total: Callable[[Tensor], Tensor],
    tolerance: float = ALIKE,
) -> Rows:
    """What a loss does with its rows, by its gradient over a batch and over the batch in which each row is there twice.

    Each argument is the loss and the gradients. Neither tells alone: at its start a loss over pairs is log 2 whatever
    stands in them, and equal siblings among the negatives move a loss by a constant.
    """
    if not one:
        return Rows.UNKNOWN
    by_value, by_gradient = (
        _compare(*parts, total=total, tolerance=tolerance)
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
    tolerance: float = ALIKE,
) -> Rows:
    found = [_distances(*tensors) for tensors in zip(gradient, under_other_draws, of_twice, strict=True)]
    distances = torch.stack(found).sum(0) if found else torch.zeros(4, dtype=torch.float64)
    size, redrawn, from_one, from_two = total(distances.nan_to_num(0.0, 0.0, 0.0)).tolist()
    tolerance = tolerance**2 * size
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
    shadow_of: LossOf,
    batch: Mapping[str, Any],
    guess: int,
    may_ignore: Sequence[int],
    total: Callable[[Tensor], Tensor],
    tolerance: float,
) -> tuple[int | None, int | None]:
    """What a mean is over, and the label that is no target; None where no weights make the whole of its parts.

    The cut is the one whose parts differ most in what they hold.
    """
    size, labels = count_samples(batch) or 0, batch.get("labels")
    device = next(x.device for x in batch.values() if isinstance(x, Tensor))
    kinds = dict.fromkeys((guess, TARGETS, SHIFTED_TARGETS, SAMPLES))
    forms = [(kind, ignored) for ignored in (None, *may_ignore) for kind in kinds]
    fitting = torch.full((len(forms),), size == 1, device=device)  # one sample says nothing against any
    try:
        cuts = [(take_rows(batch, 0, n), take_rows(batch, n, size)) for n in range(1, min(size, _CUTS + 1))]
    except (TypeError, ValueError):
        cuts = []
    if cuts:
        shares = [[_share(*cut, device, *form) for form in forms] for cut in cuts]
        best = max(range(len(cuts)), key=lambda i: max(shares[i]) - min(shares[i]))
        shadows = _ask(shadow_of, [batch, *cuts[best]], None, device).view(3, -1)
        whole, one, other = shadows.unbind()
        share = shadows.new_tensor(shares[best])[:, None]
        away = (share * one + (1 - share) * other - whole).abs()
        of_loss, of_gradient = shadows[:, :1].norm(), shadows[:, 1:].norm()
        fitting = (away[:, 0] <= tolerance * of_loss) & (away[:, 1:] <= tolerance * of_gradient).all(1)  # never if nan
    refused = total((~fitting).double()).tolist()  # on how many ranks
    fits = [form for form, ranks in zip(forms, refused, strict=True) if ranks == 0]
    # a mean over sequences (CTC's) is the plain Trainer's to weigh, that over classes of samples is not
    of_sequences = isinstance(labels, Tensor) and labels.ndim > 1
    return fits[0] if fits and not (fits[0][0] == SAMPLES and of_sequences) else (None, None)


def _ask(loss_of: LossOf, batches: Sequence[Any], num_items: Any, device: torch.device) -> Tensor:
    """A loss on batches that are no user's own: nan where it fails on one of them, as pairs do that were cut."""
    try:
        return torch.stack([loss_of(batch, num_items).double() for batch in batches])
    except Exception as error:  # whatever a user's loss raises on a batch that it never meets
        logger.debug("the loss could not be asked what it divides by: %s", error)
        return torch.full((len(batches),), float("nan"), dtype=torch.float64, device=device)


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
    asked = [{**batch, "labels": x} for x in (labels, labels, first, others)]
    losses = _ask(loss_of, asked, num_items, labels.device)
    loss, again, of_first, of_others = losses.nan_to_num(0.0, 0.0, 0.0).unbind()
    # what is not looked at moves no bit, what is may move few: new models give all labels nearly the same loss
    noise = 2 * (again - loss).abs()
    looked = torch.stack([((x - loss).abs() > noise).double() for x in (of_first, of_others)])
    moved = torch.tensor([bool(losses.isfinite().all()) and not torch.equal(x, labels) for x in (first, others)])
    first_counts, others_count, first_moved, others_moved = total(torch.cat([looked, moved.to(looked)])).tolist()
    if first_counts or not (first_moved and others_moved):
        return TARGETS
    return SHIFTED_TARGETS if others_count else SAMPLES


def _differ(a: float, b: float, tolerance: float) -> bool:
    return abs(a - b) > tolerance * abs(a)
