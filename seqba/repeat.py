"""The copy axis: the one file that lays copies out.

Copy-major throughout: row m*B + n is copy m of sample n, so `x.view(M, B, ...)` is the copy axis and every
contiguous block of B rows is a whole set of distinct samples.
"""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

BatchT = TypeVar("BatchT")

_SIZE_KEYS = ("input_ids", "labels")
_TWO_READINGS = (
    "it can be read as one item for each sample and as whole tensors; give it another size of batch, stack the items "
    "into one tensor, or repeat it yourself"
)


def repeat_batch(batch: BatchT, num_copies: int, *, dim: int = 0, num_samples: int | None = None) -> BatchT:
    """Repeat every sample of a batch M times, copy-major: row m*B + n is copy m of sample n.

    Copies enter the network equal and part at its first random layer, so one backward pass averages the
    gradient over M draws of the transform T (here: of the dropout masks):
        g = 1/(M*B) * sum_m sum_n grad loss(w, T_m(x_n), y_n)
    Hoffer et al. 2020, "Augment Your Batch" (arXiv:1901.09335), the batch-augmentation update.

    Args:
        batch: a tensor, or any nesting of mappings (`dict`, `BatchEncoding`, `ModelOutput` ...), dataclasses,
            tuples and lists of tensors with B samples along `dim`, e.g. `input_ids` (B, S); `position_ids` of three
            axes are (3, B, T). A tuple as the batch itself holds whole parts (images, targets). A list of B items
            that are not such tensors (strings, numbers, per-sample dictionaries) is repeated as a list, and numpy
            arrays are repeated like tensors. Scalars, strings and None are left as they are. A tensor with
            fewer than `dim` + 1 axes is repeated along its last one (`lengths` (B,) beside a time-major (T, B)).
        num_copies: M, at least 1.
        dim: the sample axis; 1 for the (T, B) streams of a stateful language model.
        num_samples: B; found from `input_ids` or `labels` where it is not given, and where neither exists from
            the tensors themselves, which must then agree.

    Returns:
        The same structure with M*B samples along `dim`, on the same devices, contiguous (so that in-place
        dropout may write to it). With `num_copies=1` tensors may be shared with `batch`.

    Raises:
        ValueError: `num_copies` is below 1, a tensor or list holds another number of samples than B (its key is
            named), or it can be read in two ways (a list of B images whose first axis is B too).
        TypeError: a `PackedSequence`, nested or sparse tensor, whose rows cannot be repeated.

    >>> repeat_batch({"labels": torch.tensor([[7, 8], [9, 2]])}, num_copies=2)["labels"].tolist()
    [[7, 8], [9, 2], [7, 8], [9, 2]]
    """
    if isinstance(num_copies, bool) or not isinstance(num_copies, int) or num_copies < 1:
        raise ValueError(f"num_copies must be an integer of at least 1, got {num_copies!r}")
    if num_samples is None:
        num_samples = count_samples(batch, dim)
    if isinstance(batch, tuple) and not isinstance(batch, PackedSequence):  # (images, targets), never samples
        repeater = _Repeater(num_copies, dim, num_samples)
        return repeater.rebuild(batch, [repeater.visit(x, f"batch[{i}]") for i, x in enumerate(batch)])
    return _Repeater(num_copies, dim, num_samples).visit(batch, "batch")


def unfold(x: Tensor, num_copies: int, *, dim: int = 0) -> Tensor:
    """Split the copy axis off: (M*B, ...) -> (M, B, ...), a view where `dim` is 0.

    Args:
        x: copy-major rows along `dim`.
        num_copies: M; must divide the size of `dim`.
        dim: the sample axis of `x`; the copy axis is put in front whatever it is.

    Raises:
        ValueError: the size of `dim` is no multiple of M.

    >>> unfold(torch.arange(6), 3).tolist()
    [[0, 1], [2, 3], [4, 5]]
    """
    rows = x.shape[dim] if x.ndim else 0
    if num_copies < 1 or x.ndim == 0 or rows % num_copies:
        raise ValueError(
            f"cannot unfold shape {tuple(x.shape)} into num_copies={num_copies} along dim {dim}: "
            f"the size {rows} is no positive multiple of it"
        )
    return x.unflatten(dim, (num_copies, rows // num_copies)).movedim(dim, 0)


def fold(x: Tensor, *, dim: int = 0) -> Tensor:
    """Undo `unfold`: (M, B, ...) -> (M*B, ...), copy-major along `dim` of the result.

    >>> fold(torch.tensor([[0, 1], [2, 3], [4, 5]])).tolist()
    [0, 1, 2, 3, 4, 5]
    """
    if x.ndim < 2:
        raise ValueError(f"fold needs a copy axis and a sample axis, (M, B, ...), got shape {tuple(x.shape)}")
    return x.movedim(0, dim).flatten(dim, dim + 1)


def copy_ids(num_copies: int, num_samples: int, *, device: torch.device | str | None = None) -> Tensor:
    """The copy that each row of a repeated batch is: (M*B,), int64, in the order of `repeat_batch`.

    >>> copy_ids(2, 3).tolist()
    [0, 0, 0, 1, 1, 1]
    """
    if num_copies < 1 or num_samples < 0:
        raise ValueError(f"copy_ids needs M >= 1 and B >= 0, got M={num_copies}, B={num_samples}")
    return torch.arange(num_copies, device=device).repeat_interleave(num_samples)


def keys_of_rows(keys: Tensor, copies: Sequence[int]) -> Tensor:
    """The keys of a pass's rows: those of its B samples, (B, k), for each copy and with its number -> (K*B, k + 1).

    >>> keys_of_rows(torch.tensor([[5, 7], [5, 8]]), (0, 2)).tolist()
    [[5, 7, 0], [5, 8, 0], [5, 7, 2], [5, 8, 2]]
    """
    which = torch.tensor(copies, device=keys.device).repeat_interleave(len(keys))
    return torch.cat([keys.repeat(len(copies), 1), which[:, None]], 1)


def count_samples(batch: object, dim: int = 0) -> int | None:
    """B: the size of `input_ids` or `labels` along `dim` wherever they stand, else the size that all tensors share.

    None where the batch holds no tensor with an axis.

    >>> count_samples({"input_ids": torch.zeros(3, 5), "weight": torch.tensor(1.0)})
    3
    """
    named: int | None = None
    sizes: dict[int, str] = {}
    for path, leaf in _tensor_leaves(batch, "batch"):
        size = leaf.size(min(dim, leaf.ndim - 1))  # a nested tensor has no shape
        if path.rsplit(".", 1)[-1] in _SIZE_KEYS and leaf.ndim > dim and "[" not in path.removeprefix("batch["):
            named = size if named is None or path.endswith(_SIZE_KEYS[0]) else named
        sizes.setdefault(size, path)
    if named is not None:
        return named
    if len(sizes) > 1:
        described = ", ".join(f"{path} has {size}" for size, path in sizes.items())
        raise ValueError(
            f"the number of samples is not clear along dim {dim}: {described}; there is no input_ids or "
            "labels to go by, so pass num_samples"
        )
    return next(iter(sizes), None)


def largest_tensor(batch: object) -> tuple[int, int]:
    """How large a batch is: the numbers in its largest tensor, and the longest side of any.

    >>> largest_tensor({"input_ids": torch.zeros(3, 5), "labels": torch.zeros(2, 7)})
    (15, 7)
    """
    leaves = [leaf for _, leaf in _tensor_leaves(batch, "batch")]
    sides = [side for leaf in leaves if _is_dense(leaf) for side in leaf.shape]
    return max((leaf.numel() for leaf in leaves), default=0), max(sides, default=0)


def _tensor_leaves(x: Any, path: str) -> list[tuple[str, Tensor]]:
    """All tensors with at least one axis, each with its path."""
    if isinstance(x, Tensor):
        return [(path, x)] if _has_rows(x) else []
    return [leaf for name, child in _children(x, path) for leaf in _tensor_leaves(child, name)]


def _children(x: Any, path: str) -> list[tuple[str, Any]]:
    if isinstance(x, Mapping):
        return [(f"{path}.{key}", value) for key, value in x.items()]
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return [(f"{path}.{field.name}", getattr(x, field.name)) for field in dataclasses.fields(x)]
    if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence):
        return [(f"{path}[{i}]", value) for i, value in enumerate(x)]
    return []


def _has_rows(x: Tensor) -> bool:
    return not _is_dense(x) or x.ndim > 0


def _is_dense(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_nested


@dataclasses.dataclass(frozen=True)
class _Repeater:
    num_copies: int
    dim: int
    num_samples: int | None

    def visit(self, x: Any, path: str) -> Any:
        if isinstance(x, Tensor):
            return self.tensor(x, path) if _has_rows(x) else x
        if isinstance(x, np.ndarray) and x.ndim:
            return self.tensor(torch.from_numpy(x), path).numpy()
        if isinstance(x, PackedSequence):
            raise TypeError(f"{path} is a PackedSequence, whose rows are interleaved in time; repeat before packing")
        if isinstance(x, (list, tuple)) and not self.is_container(x, path):
            return self.items(x, path)
        children = _children(x, path)
        if not children:
            return x
        return self.rebuild(x, [self.visit(child, name) for name, child in children])

    def tensor(self, x: Tensor, path: str) -> Tensor:
        if not _is_dense(x):
            raise TypeError(f"{path} is a nested or sparse tensor; repeat_batch takes dense (strided) tensors")
        dim = min(self.dim, x.ndim - 1)
        if path.endswith("position_ids") and x.ndim == 3 and dim == 0:  # (3, B, T): in time, height and width
            if x.shape[0] == x.shape[1] == self.num_samples:
                raise ValueError(f"{path} has shape {tuple(x.shape)}: {_TWO_READINGS}")
            dim = int(x.shape[0] != self.num_samples)
        if x.shape[dim] != self.num_samples:
            raise ValueError(
                f"{path} has shape {tuple(x.shape)}: {x.shape[dim]} along dim {dim}, but the batch holds "
                f"{self.num_samples} samples; give it one row per sample, or take it out of the batch"
            )
        if self.num_copies == 1:
            return x.contiguous()
        return torch.cat([x] * self.num_copies, dim=dim)

    def is_container(self, x: list | tuple, path: str) -> bool:
        """Whether a list holds whole batches of tensors (and is walked), or one item for each sample."""
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return True
        tensors = [leaf for _, leaf in _tensor_leaves(x, "")]
        if not tensors:
            scalars = any(isinstance(item, Tensor) for item in x)
            return self.num_samples is None or (scalars and len(x) != self.num_samples)
        fits = all(_is_dense(leaf) and leaf.shape[min(self.dim, leaf.ndim - 1)] == self.num_samples for leaf in tensors)
        if fits and isinstance(x, list) and len(x) == self.num_samples:
            raise ValueError(f"{path} is a list of {len(x)} whose tensors have {len(x)} rows too: {_TWO_READINGS}")
        return fits or len(x) != self.num_samples

    def items(self, x: list | tuple, path: str) -> list | tuple:
        if len(x) == 0:
            return x
        if len(x) != self.num_samples:
            raise ValueError(
                f"{path} is a list of {len(x)} items, but the batch holds {self.num_samples} samples; give it "
                "one item per sample, or take it out of the batch"
            )
        return type(x)(list(x) * self.num_copies)

    def rebuild(self, x: Any, values: list) -> Any:
        if isinstance(x, MutableMapping):
            new = copy.copy(x)
            for key, value in zip(list(x), values, strict=True):
                new[key] = value
            self.rebuild_encodings(new)
            return new
        if isinstance(x, Mapping):
            return type(x)(zip(x, values, strict=True))  # type: ignore[call-arg]
        if dataclasses.is_dataclass(x):
            same = copy.copy(x)
            for field, value in zip(dataclasses.fields(x), values, strict=True):
                object.__setattr__(same, field.name, value)
            return same
        return type(x)(*values) if hasattr(x, "_fields") else type(x)(values)

    def rebuild_encodings(self, x: Any) -> None:
        """`BatchEncoding` of a fast tokenizer also holds one `Encoding` a row: `word_ids(row)` stays right."""
        encodings = getattr(x, "_encodings", None)
        if isinstance(encodings, list) and len(encodings) == self.num_samples:
            x._encodings = encodings * self.num_copies
