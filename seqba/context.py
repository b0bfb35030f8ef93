"""The state of the running pass: its copies, the batch that they are of, and whether a draw is meant for all of them.

A layer that draws per copy imports this and nothing else. There is one pass for the whole process, not one a thread: a
backward pass that recomputes activations on a thread of its own (gradient checkpointing under CUDA) reads it too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

_running: tuple[tuple[int, ...], int, Tensor | None] | None = None  # copies, batch, numbers of its samples
_shared_depth = 0


def current_copies() -> tuple[int, ...] | None:
    """The copies whose rows the running pass holds, in order, or None outside a training pass.

    A module that draws one mask per copy reads it: `len(current_copies())` blocks of rows follow each other.

    >>> with copies_of_pass((0, 1, 2)):
    ...     current_copies()
    (0, 1, 2)
    """
    return None if _running is None else _running[0]


def current_batch() -> int | None:
    """The place of the running pass's batch among this rank's batches of the update; None outside a training pass."""
    return None if _running is None else _running[1]


def current_rows() -> Tensor | None:
    """The samples of its batch that the running pass holds, where these are not all: (b,)."""
    return None if _running is None else _running[2]


@contextmanager
def copies_of_pass(copies: Sequence[int], *, batch: int = 0, rows: Tensor | None = None) -> Iterator[None]:
    """Tell modules which copies the pass inside holds, and of which batch of the update. Changes no random draw.

    `rows` are the numbers of the samples, where one copy of a part of the batch is looked at.

    Raises:
        ValueError: no copies, or a copy twice or below 0.
        RuntimeError: a pass is running already.
    """
    numbers = tuple(copies)
    if not numbers or min(numbers) < 0 or len(set(numbers)) != len(numbers):
        raise ValueError(f"copies must be distinct numbers from 0, at least one of them, got {list(numbers)}")
    with rows_of_copies(numbers, batch, rows):
        yield


@contextmanager
def rows_of_copies(numbers: tuple[int, ...], batch: int, rows: Tensor | None = None) -> Iterator[None]:
    """`copies_of_pass` that is not asked whether the copies are distinct."""
    global _running
    if _running is not None:
        raise RuntimeError(f"a pass over copies {_running[0]} is already running; passes do not nest")
    _running = numbers, batch, rows
    try:
        yield
    finally:
        _running = None


@contextmanager
def shared_draws() -> Iterator[None]:
    """State that what is drawn inside is meant to be one draw for all copies of a pass.

    For a module whose mask has no rows: a dropped position table (1, T, D), LayerDrop over a vector, a permutation.
    `copy_streams` then draws it from (seed, update, shard), without the copy, in one piece.

    >>> with shared_draws():
    ...     draws_are_shared()
    True
    """
    global _shared_depth
    _shared_depth += 1
    try:
        yield
    finally:
        _shared_depth -= 1


def draws_are_shared() -> bool:
    """Whether the code that asks runs inside `shared_draws`."""
    return _shared_depth > 0
