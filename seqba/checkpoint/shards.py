"""State dictionaries of models that are sharded over ranks (FSDP2): gathered whole, and cut again."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map


def full_state_dict(owner: nn.Module | torch.optim.Optimizer, *, keep: bool = True) -> dict[str, Any]:
    """The state dictionary of a model or an optimizer, every shard of a `DTensor` gathered.

    Every rank must call it, in the same order, as gathering is collective. Tied tensors stay tied. Tensors that are not
    sharded are torch's own, not copied. (`torch.distributed.checkpoint.state_dict` would step an optimizer that has no
    state yet.)

    Args:
        owner: with the names of a run on one rank (unwrapped of DDP).
        keep: False on ranks that do not write: they help to gather, and hold nothing.
    """
    gathered: dict[int, Tensor] = {}

    def whole(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x.detach() if isinstance(x, Tensor) else x
        if id(x) not in gathered:
            full = x.full_tensor().detach()
            gathered[id(x)] = full if keep else full.new_empty(0)
        return gathered[id(x)]

    # with `keep_vars` a tied parameter is one object under all its names
    state = owner.state_dict(keep_vars=True) if isinstance(owner, nn.Module) else owner.state_dict()
    return dict(tree_map(whole, dict(state)))


def sharded_like(whole: Tensor, target: Tensor) -> Tensor:
    """A tensor as `target` is: the same, or this rank's shard of it where `target` is a `DTensor`."""
    if not isinstance(target, DTensor) or whole.shape != target.shape:
        return whole
    return distribute_tensor(whole.to(target.device), target.device_mesh, target.placements)
