"""A batch read by the first rank of a group, and sent to the others: nobody reads, decodes or collates it again."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from seqba.groups import CopyGroup
from tasks.cli.errors import UserError, reason_of


class GroupChannel:
    """Sends what the first rank of a group has read to its other ranks, over gloo, from the processor's memory.

    All ranks of the run must build it, and those of a group call `share` equally often, from one thread each.

    Args:
        group: this rank's.
        timeout: how long a rank waits for the others.
    """

    def __init__(self, group: CopyGroup, timeout: timedelta) -> None:
        size = group.ranks_per_group
        handles = [
            dist.new_group(list(range(first, first + size)), backend="gloo", timeout=timeout)
            for first in range(0, group.world_size, size)
        ]
        self._handle: Any
        self._handle, self._first = handles[group.index], group.index * size
        self.is_reader = group.rank == self._first

    def share(self, batch: Any = None, *, error: Exception | None = None) -> Any:
        """The batch of the first rank, a nesting of tensors and plain values; the others give none.

        Raises:
            Exception: the first rank's `error`; on the other ranks a UserError that says it.
        """
        tensors: list[Tensor] = []

        def noted(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            tensors.append(leaf)
            return _Place(leaf.dtype, tuple(leaf.shape))

        sizes, message = torch.zeros(2, dtype=torch.long), torch.empty(0, dtype=torch.uint8)
        if self.is_reader:
            header = pickle.dumps((tree_map(noted, batch), None if error is None else reason_of(error)))
            parts = [torch.frombuffer(bytearray(header), dtype=torch.uint8)]
            parts += [x.contiguous().view(-1).view(torch.uint8) for x in tensors]
            message = torch.cat([padded for part in parts for padded in (part, _padding(part.numel()))])
            sizes[0], sizes[1] = len(header), message.numel()
        dist.broadcast(sizes, self._first, group=self._handle)
        if not self.is_reader:
            message = torch.empty(int(sizes[1]), dtype=torch.uint8)
        dist.broadcast(message, self._first, group=self._handle)
        if error is not None:
            raise error
        if self.is_reader:
            return batch
        length = int(sizes[0])
        planned, fault = pickle.loads(message[:length].numpy().tobytes())
        if fault is not None:
            raise UserError(fault)
        begin = length + len(_padding(length))

        def taken(leaf: Any) -> Any:
            nonlocal begin
            if not isinstance(leaf, _Place):
                return leaf
            size = torch.Size(leaf.shape).numel() * leaf.dtype.itemsize
            x = message[begin : begin + size].view(leaf.dtype).view(leaf.shape)
            begin += size + len(_padding(size))
            return x

        return tree_map(taken, planned)


@dataclass(frozen=True)
class _Place:
    """A tensor of a message: what is needed to find it again."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def _padding(size: int) -> Tensor:
    """Bytes after a part of a message, so that the next begins where numbers of any type may."""
    return torch.zeros(-size % 16, dtype=torch.uint8)
