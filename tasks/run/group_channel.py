"""A batch read by the first rank of a group, and sent to the others: nobody reads, decodes or collates it again."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

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
        leaves, structure = tree_flatten(batch)
        tensors = [leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor)]
        plan = [(leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        header = [(plan, is_tensor, structure, None if error is None else reason_of(error))]
        dist.broadcast_object_list(header, self._first, group=self._handle, device=torch.device("cpu"))
        plan, is_tensor, structure, fault = header[0]
        if error is not None:
            raise error
        if fault is not None:
            raise UserError(fault)
        sizes = [_num_bytes(*place) for place, here in zip(plan, is_tensor, strict=True) if here]
        if self.is_reader:
            flat = torch.cat([x.reshape(-1).view(torch.uint8) for x in tensors]) if tensors else torch.empty(0)
        else:
            flat = torch.empty(sum(sizes), dtype=torch.uint8)
        if sizes:
            dist.broadcast(flat, self._first, group=self._handle)
        if self.is_reader:
            return batch
        parts = iter(flat.split(sizes)) if sizes else iter(())
        found = [
            # a copy, since a part of a buffer may not begin where its numbers must
            next(parts).clone().view(place[0]).view(place[1]) if here else place
            for place, here in zip(plan, is_tensor, strict=True)
        ]
        return tree_unflatten(found, structure)


def _num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize
