"""Text cut into parallel streams, and read in windows of random length, batch first."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from seqba.draws.generators import mix
from tasks.cli.errors import DataError

_SHORTEST = 5  # time steps of a window
_SPREAD = 5.0  # standard deviation of a window's length
_HALVED = 0.05  # of the windows, by chance


class Streams:
    """A text as G groups of B streams of equal length: each stream is a stretch of it, and they follow one another.

    A batch is a window of one group. Indices of this data set count the time steps of all groups: g * length + t.

    Args:
        ids: the text, (N,).
        batch_size: B.
        num_groups: G, one for each batch of an update on all ranks.

    Attributes:
        length: time steps of a stream that have a target.
        left_out: ids at the end of the text that fill no stream.

    Raises:
        DataError: the text has fewer than two ids for each stream.

    >>> streams = Streams(np.arange(11), batch_size=2)
    >>> streams.collate(streams.__getitems__([1, 2]))["labels"].tolist(), streams.left_out
    ([[2, 3], [7, 8]], 1)
    """

    def __init__(self, ids: npt.NDArray[np.integer[Any]], batch_size: int, num_groups: int = 1) -> None:
        count = batch_size * num_groups
        width = len(ids) // count
        if width < 2:
            raise DataError(
                f"the text has {len(ids):,} tokens, too few for {count:,} streams of at least 2 (--batch-size "
                f"{batch_size}, times ranks and accumulation); lower --batch-size or give more text"
            )
        self.length, self.left_out = width - 1, len(ids) - width * count
        self._ids = torch.from_numpy(np.ascontiguousarray(ids[: width * count])).view(num_groups, batch_size, width)

    def __len__(self) -> int:
        """Time steps of all groups."""
        return self.length * len(self._ids)

    def __getitems__(self, steps: list[int]) -> list[Tensor]:
        """The ids of consecutive time steps, and the one after them, (B, T + 1)."""
        group, start = divmod(steps[0], self.length)
        return [self._ids[group, :, start : start + len(steps) + 1]]

    @staticmethod
    def collate(windows: list[Tensor]) -> dict[str, Tensor]:
        """`input_ids` (B, T), and `labels` (B, T): the ids that follow them."""
        ids = windows[0].long()
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


class WindowSampler:
    """Windows of random length, one after the other through an epoch: a `seqba.BatchSampler` of `Streams`.

    A window has max(5, N(L, 5)) time steps, L being `bptt`, or half of it in one window of twenty (Merity et al. 2018,
    §5); the last one ends with the text. The lengths are a function of (seed, epoch, bptt, length) alone: they are the
    same on every rank, for every number of copies and plan. Each window is read from every group of streams in turn:
    shard s gets the groups s * batches_per_update + i.

    Args:
        length: time steps of a stream.
        bptt: L, the usual number of time steps.
        seed: of the lengths.
        num_shards, shard, batches_per_update: as in `seqba.TokenBatchSampler`.
    """

    def __init__(
        self,
        length: int,
        bptt: int,
        *,
        seed: int,
        num_shards: int = 1,
        shard: int = 0,
        batches_per_update: int = 1,
    ) -> None:
        self.length, self.bptt, self.seed = length, bptt, seed
        self.groups = range(shard * batches_per_update, (shard + 1) * batches_per_update)
        self._made_with = {
            "time steps of a stream": length,
            "bptt": bptt,
            "seed": seed,
            "batches of all shards in an update": num_shards * batches_per_update,
        }
        self.epoch = self.first_batch = 0

    def windows(self) -> list[range]:
        """The time steps of each window of the current epoch."""
        draw = random.Random(mix(self.seed, self.epoch))
        starts = [0]
        while starts[-1] < self.length:
            base = self.bptt / 2 if draw.random() < _HALVED else self.bptt
            size = max(_SHORTEST, int(draw.gauss(base, _SPREAD)))
            starts.append(min(starts[-1] + size, self.length))
        return [range(*window) for window in pairwise(starts)]

    def __len__(self) -> int:
        """Batches of this shard in the current epoch."""
        return len(self.windows()) * len(self.groups)

    def __iter__(self) -> Iterator[list[int]]:
        """The indices of each batch, from `first_batch` on."""
        batches = [(window, group) for window in self.windows() for group in self.groups]
        for window, group in batches[self.first_batch :]:
            yield [group * self.length + step for step in window]

    def set_epoch(self, epoch: int, first_batch: int | None = None) -> None:
        """Let the next iteration read `epoch`, from this shard's batch `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch or 0

    def state_dict(self, batches_done: int) -> dict[str, Any]:
        """The position after this shard's first `batches_done` batches of the current epoch."""
        return {"epoch": self.epoch, "updates_in_epoch": batches_done // len(self.groups), "made_with": self._made_with}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken; ValueError where the windows would be others."""
        if state["made_with"] != self._made_with:
            raise ValueError(
                f"its windows were {state['made_with']}, and are {self._made_with} now; resume with as many groups "
                "of ranks and batches an update"
            )
        self.set_epoch(state["epoch"], state["updates_in_epoch"] * len(self.groups))
