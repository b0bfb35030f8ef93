"""A Trainer's training batch: its samples, its targets, and whether it may be repeated."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import find_batch_size
from torch import Tensor

from seqba.loss import IGNORE_INDEX, count_targets
from seqba.repeat import count_samples, keys_of_rows, repeat_batch

# What `count_items` counts, by position.
SAMPLES, TARGETS, SHIFTED_TARGETS = 0, 1, 2

# Keys of batches that hold several sequences in one row, with the places where one ends and the next begins.
_PACKING_KEYS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


class UnrepeatableError(ValueError):
    """A batch of which a pass can hold one copy alone."""


@dataclass
class UpdateItems:
    """The samples and targets of an update, as `count_items` counts them.

    Attributes:
        batches: of each of this rank's batches.
        all: the batches whose targets make the denominator.
        met: of all batches of all ranks.
        try_first: whether a batch of some rank is larger than any that fitted before.
        packed: whether a batch of some rank is packed.
        done: how many of the batches were given to the step.
        source: the batches themselves, until it is known what a target is.
    """

    batches: list[Tensor]
    all: Tensor
    met: Tensor
    try_first: bool = False
    packed: bool = False
    done: int = 0
    source: Sequence[Mapping[str, Any]] = ()


def count_items(batch: Mapping[str, Any], device: torch.device, ignored: int | None = None) -> Tensor:
    """Samples, targets, and targets of a loss that predicts label t+1 at position t: (3,), int64.

    Samples are rows, in packed batches sequences. Targets are integer labels other than -100 and `ignored`; where
    labels are numbers to regress, boxes, or there are none, every sample is one target. `shift_labels`, where a
    collator gives them, are the targets of a shifted loss.

    >>> labels = torch.tensor([[5, 6, -100], [7, 8, 9]])
    >>> count_items({"input_ids": labels, "labels": labels}, torch.device("cpu")).tolist()
    [2, 5, 3]
    """
    samples = _count_sequences(batch)
    labels = batch.get("shift_labels", batch.get("labels"))
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        counts = [samples, samples, samples]
    else:
        shifted = labels if "shift_labels" in batch or labels.ndim < 2 else labels[..., 1:]
        if ignored is not None:
            labels, shifted = (x.masked_fill(x == ignored, IGNORE_INDEX) for x in (labels, shifted))
        counts = [samples, count_targets(labels), count_targets(shifted)]
    return torch.stack([torch.as_tensor(count).to(device) for count in counts])


def is_packed(batch: Mapping[str, Any]) -> bool:
    """Whether a row holds several sequences: it says where they begin, or its positions restart inside a row.

    >>> is_packed({"position_ids": torch.tensor([[0, 1, 2, 0, 1]])}), is_packed({"input_ids": torch.ones(1, 5)})
    (True, False)
    """
    return any(key in batch for key in _PACKING_KEYS) or bool(_restarts(batch).any())


def without_packing(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The same rows without what kernels are told of their boundaries, so that they can be repeated."""
    marks = (*_PACKING_KEYS, "max_length_q", "max_length_k")
    return {key: value for key, value in batch.items() if key not in marks}


def take_copies(batch: Mapping[str, Any], num_copies: int) -> Any:
    """The rows of a pass over `num_copies` copies; one copy is the batch itself, in a mapping of its own.

    Raises:
        UnrepeatableError: a value without one row per sample, which only passes of one copy can take.
    """
    if num_copies == 1:
        return copy.copy(batch)
    try:
        return repeat_batch(batch, num_copies)
    except (ValueError, TypeError) as error:
        raise UnrepeatableError(f"{error}; or run one copy a pass (copies_per_pass=1)") from error


def take_rows(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Some samples of a batch.

    Raises:
        ValueError: a tensor without one row for each sample.
    """
    size = count_samples(batch)
    for name, x in batch.items():
        if isinstance(x, Tensor) and x.ndim and len(x) != size:
            raise ValueError(f"{name} has {len(x)} rows, not {size}")
    return {
        name: x[start:stop] if isinstance(x, (Tensor, list)) and _len(x) == size else x for name, x in batch.items()
    }


def _len(x: Tensor | list) -> int:
    return len(x) if isinstance(x, list) or x.ndim else 0


def transformed(
    rows: Any, name: str, transform: Callable[..., Tensor], copies: tuple[int, ...], key: tuple[int, ...]
) -> Any:
    """The rows of a pass, their images under T: what is drawn for a row depends on (*key, sample, copy) alone.

    Args:
        rows: of `take_copies`, whose images are written over; (K*B, C, H, W), copy-major, under `name`.
        transform: T, called with the images and `keys`, as a `seqba.transforms.BatchTransform`.
        copies: the copies that the rows are.
        key: of the batch: (seed, update, shard).

    Raises:
        ValueError: there are no images under `name`.
    """
    images = rows.get(name)
    if not isinstance(images, Tensor):
        raise ValueError(f"transform needs the images of a batch under {name!r}, which has {', '.join(rows)}")
    size = len(images) // len(copies)
    samples = torch.tensor([[*key, sample] for sample in range(size)])
    rows[name] = transform(images, keys=keys_of_rows(samples, copies).to(images.device))
    return rows


def _count_sequences(batch: Mapping[str, Any]) -> int | Tensor:
    if "cu_seq_lens_q" in batch:
        return len(batch["cu_seq_lens_q"]) - 1
    try:
        rows = count_samples(batch)
    except ValueError:
        rows = find_batch_size(batch)
    return (rows or 0) + _restarts(batch).sum()


def _restarts(batch: Mapping[str, Any]) -> Tensor:
    """(B, T-1), where a position is followed by a smaller one and neither is padding."""
    positions, mask = batch.get("position_ids"), batch.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return torch.zeros(0, dtype=torch.bool)
    restarts = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        restarts = restarts & mask[:, 1:].bool() & mask[:, :-1].bool()
    return restarts
