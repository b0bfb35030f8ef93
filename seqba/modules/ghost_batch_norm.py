"""Ghost batch normalisation: batch norm in blocks of a batch, each block of distinct samples."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seqba.context import current_copies


class GhostBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that normalises blocks of about `block_size` rows, each by its own mean and variance.

    Hoffer et al. 2017, "Train longer, generalize better", §4. In a pass of K copies of B samples a block holds rows of
    one copy, so that no sample stands in it twice (two copies of one image would hide its variance), and the blocks are
    the same whether copies run in one pass or in several. Each copy's rows are cut into B // block_size blocks (one at
    least), whose sizes differ by one where they do not divide.

    The blocks come one after the other, in the order of copies and rows, and each moves the running statistics: a fused
    pass leaves them as its copies one by one do. With one copy and `block_size` = B this is `nn.BatchNorm2d`.

    Args:
        num_features: C.
        block_size: rows of a block, at least 2; None for all rows of a copy.
        options: those of `nn.BatchNorm2d`.

    Raises:
        ValueError: a block size below 2; in training, a block that would have one value a channel.
    """

    block_size: int | None

    def __init__(self, num_features: int, block_size: int | None = None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.block_size = _checked(block_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (rows, C, H, W); rows copy-major where a pass of copies runs."""
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        num_copies = len(current_copies() or (0,))
        if len(x) % num_copies:
            raise ValueError(f"{len(x)} rows are no multiple of the pass's {num_copies} copies")
        rows = len(x) // num_copies
        num_blocks = 1 if self.block_size is None else max(1, rows // self.block_size)
        if num_copies * num_blocks == 1:
            return super().forward(x)
        blocks = [block for copy in x.chunk(num_copies) for block in copy.tensor_split(num_blocks)]
        return torch.cat([super(GhostBatchNorm2d, self).forward(block) for block in blocks])

    def extra_repr(self) -> str:
        """As of `nn.BatchNorm2d`, and the block."""
        return f"{super().extra_repr()}, block_size={self.block_size}"


_GHOSTS: dict[type, type] = {nn.BatchNorm2d: GhostBatchNorm2d}


def convert_ghost_batch_norm(model: nn.Module, block_size: int | None = None) -> nn.Module:
    """Make every `nn.BatchNorm2d` of a model ghost batch norm, and those of classes that inherit from it (timm's).

    The modules stay what they were but for their class, with their weights, statistics, names and hooks, so that
    optimizers, ties and saved states stay too.

    Args:
        model: changed in place, and returned.
        block_size: as of `GhostBatchNorm2d`.

    >>> from torchvision.models import resnet18
    >>> model = convert_ghost_batch_norm(resnet18(), block_size=32)
    >>> sum(isinstance(module, GhostBatchNorm2d) for module in model.modules())
    20
    """
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.block_size = _checked(block_size)  # type: ignore[assignment]
            module.__class__ = _ghost_of(type(module))
    return model


def _ghost_of(kind: type[nn.BatchNorm2d]) -> Any:
    """Ghost batch norm around what a class makes of a batch; one class for each."""
    if issubclass(kind, GhostBatchNorm2d):
        return kind
    if kind not in _GHOSTS:
        _GHOSTS[kind] = type(f"Ghost{kind.__name__}", (GhostBatchNorm2d, kind), {})
    return _GHOSTS[kind]


def _checked(block_size: int | None) -> int | None:
    if block_size is not None and block_size < 2:
        raise ValueError(f"block_size must be at least 2, got {block_size}")
    return block_size
