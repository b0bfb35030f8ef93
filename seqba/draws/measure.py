"""The look at a model before its copies get streams: `measure_draws`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from seqba.context import rows_of_copies
from seqba.draws.measured import (
    SHARED,
    DrawAxes,
    Look,
    Outputs,
    add_up,
    batch_norms,
    buffers_of,
    compare_counts,
    quiet,
    refuse_state,
    where_they_part,
)
from seqba.draws.streams import CopyStreams, seeded_streams
from seqba.errors import StreamError
from seqba.snapshot import model_snapshot

logger = logging.getLogger(__name__)

Snapshot = Callable[[], Callable[[], None]]  # remembers something as it is, and returns what puts it back


def measure_draws(
    model: nn.Module,
    pass_of: Callable[[tuple[int, ...]], Any],
    copies: tuple[int, int] = (0, 1),
    *,
    seed: int = 0,
    update: int = 0,
    shard: int = 0,
    batch: int = 0,
    known: DrawAxes | None = None,
    compare: bool = True,
    rounding: float | None = None,
    carried: Sequence[Snapshot] = (),
) -> DrawAxes:
    """Find out which axis of each draw is the copies', and whether a fused pass is its copies alone.

    Passes run without gradients, and leave modes, buffers and generators as they were: one with one copy, twice, and
    one with two equal copies, under equal draws; then each of two copies alone, and both in one pass. That is the
    work of eight forward passes over one copy. Batch norm couples the rows of a pass: it stands in evaluation mode
    meanwhile, and a warning names it.

    Args:
        model: in the mode in which it trains.
        pass_of: the forward pass over the rows of some copies; returns outputs with rows, or a loss that is a sum
            over them. A copy's number may come twice.
        copies: two of them.
        seed, update, shard, batch: as of `copy_streams`.
        known: what an earlier look has found; it is added to.
        compare: whether the fused pass is set against the copies alone.
        rounding: what it may move, relatively; by default by the type of what comes out, and autocast.
        carried: snapshots of what else a pass changes.

    Returns:
        What `copy_streams(axes=...)` takes.

    Raises:
        StreamError: a draw that grows otherwise than by rows on one axis; a module that draws more or other numbers for
            more rows; passes from one seed that differ (torch.seed(), a generator or a counter of the model's own); a
            fused pass that is not its copies alone (rows that act on each other, state between passes). It names the
            module or the operation.

    >>> import torch
    >>> from seqba import copy_streams
    >>> layer, x = nn.Dropout(0.5), torch.ones(3, 8)
    >>> axes = measure_draws(layer, lambda copies: layer(torch.cat([x] * len(copies), 1)))  # rows along axis 1
    >>> with copy_streams((0, 1), seed=1, update=5, axes=axes):
    ...     fused = layer(torch.cat([x, x], 1))
    >>> with copy_streams((1,), seed=1, update=5, axes=axes):
    ...     torch.equal(layer(x), fused[:, 8:])
    True
    """
    axes = DrawAxes(model) if known is None else known
    first, second = copies
    with quiet(model):
        restores, of_carried = model_snapshot(model), [snapshot() for snapshot in carried]

        def reset(*, state: bool = True) -> None:
            if state:
                restores()
            for restore in of_carried:
                restore()

        def run(rows: tuple[int, ...], streams: CopyStreams, notes: Any) -> Any:
            with (
                axes.places.followed(notes.note_call),
                rows_of_copies(rows, batch),
                seeded_streams(streams, seed=seed, update=update, shard=shard),
            ):
                return pass_of(rows)

        def look(of_pass: tuple[int, ...], alone: Look | None = None, *, shared: bool = False) -> tuple[Look, Any]:
            notes = Look(axes.places, alone, None if shared else axes)
            streams = (SHARED,) * len(of_pass) if shared else of_pass
            rows = (first,) * len(of_pass) if shared else of_pass
            return notes, run(rows, CopyStreams(streams, axes=notes), notes)

        def outputs(of_pass: tuple[int, ...]) -> Outputs:
            notes = Outputs()
            run(of_pass, CopyStreams(of_pass, axes=axes), notes)
            return notes

        try:
            alone, of_one = look((first,), shared=True)
            after_one = buffers_of(model)
            reset(state=False)
            _, again = look((first,), shared=True)
            refuse_state(model, (of_one, after_one), (again, buffers_of(model)), rounding)
            reset()
            twice, _ = look((first, second), alone, shared=True)
            compare_counts(alone, twice)
            axes.add(twice)
            if compare:
                reset()
                (one, a), (other, b) = look((first,)), look((second,))
                reset()
                both, fused = look(copies)
                compare_counts(one, both)
                compare_counts(other, both)
                if not add_up(a, b, fused, rounding):
                    reset()
                    parts = outputs((first,)), outputs((second,))
                    reset()
                    module = where_they_part(*parts, outputs(copies), axes.places)
                    raise StreamError(
                        f"a fused pass of {type(model).__name__} is not its copies one by one; they part at {module}: "
                        "its rows act on each other, or it keeps state from one pass to the next, so that plans would "
                        "differ; switch it off, or train without reproducible copies"
                    )
        finally:
            reset()
    if known is None and (coupled := batch_norms(model)):
        logger.warning(
            "%d batch norms (%s) normalise all rows of a pass together: plans agree only with "
            "seqba.modules.convert_ghost_batch_norm, or where the same copies stand in every pass",
            len(coupled),
            type(coupled[0]).__name__,
        )
    return axes
