"""Ghost batch normalisation: batch norm in blocks of a batch, each block of distinct samples."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqba.context import current_copies


class GhostBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` that normalises blocks of about `block_size` rows, each by its own mean and variance.

    Hoffer et al. 2017, "Train longer, generalize better", §4. In a pass of K copies of B samples a block holds rows of
    one copy, so that no sample stands in it twice (two copies of one image would hide its variance), and the blocks are
    the same whether copies run in one pass or in several. Each copy's rows are cut into B // block_size blocks (one at
    least), whose sizes differ by one where they do not divide.

    The running statistics move as if the blocks had come one after the other, in the order of copies and rows:
    a fused pass leaves them as its copies one by one do. With one copy and `block_size` = B this is `nn.BatchNorm2d`.

    Args:
        num_features: C.
        block_size: rows of a block, at least 2; None for all rows of a copy.
        options: those of `nn.BatchNorm2d`.

    Raises:
        ValueError: a block size below 2; in training, a block that would have one value a channel.
    """

    def __init__(self, num_features: int, block_size: int | None = None, **options: object) -> None:
        super().__init__(num_features, **options)  # type: ignore[arg-type]
        if block_size is not None and block_size < 2:
            raise ValueError(f"block_size must be at least 2, got {block_size}")
        self.block_size = block_size

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (rows, C, H, W); rows copy-major where a pass of copies runs."""
        self._check_input_dim(x)
        if not self.training:
            return super().forward(x)
        num_copies = len(current_copies() or (0,))
        if len(x) % num_copies:
            raise ValueError(f"{len(x)} rows are no multiple of the pass's {num_copies} copies")
        rows = len(x) // num_copies
        num_blocks = 1 if self.block_size is None else max(1, rows // self.block_size)
        if rows % num_blocks == 0:
            return self._normalise(x, num_copies * num_blocks)
        blocks = [block for copy in x.chunk(num_copies) for block in copy.tensor_split(num_blocks)]
        return torch.cat([self._normalise(block, 1) for block in blocks])

    def _normalise(self, x: Tensor, num_blocks: int) -> Tensor:
        """Blocks of equal size in one call: their channels stand side by side."""
        side_by_side = x.unflatten(0, (num_blocks, -1)).transpose(0, 1).flatten(1, 2) if num_blocks > 1 else x
        weight, bias = (None if p is None else p.repeat(num_blocks) for p in (self.weight, self.bias))
        mean, variance = self._statistics(num_blocks, x)
        out = F.batch_norm(side_by_side, mean, variance, weight, bias, True, 1.0, self.eps)  # writes a block's own
        if mean is not None and variance is not None:
            self._move(mean.view(num_blocks, -1), variance.view(num_blocks, -1))
        if num_blocks == 1:
            return out
        return out.unflatten(1, (num_blocks, -1)).transpose(0, 1).flatten(0, 1)

    def _statistics(self, num_blocks: int, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if self.running_mean is None:
            return None, None
        empty = torch.empty(num_blocks * self.num_features, dtype=self.running_mean.dtype, device=x.device)
        return empty.zero_(), torch.ones_like(empty)

    @torch.no_grad()
    def _move(self, means: Tensor, variances: Tensor) -> None:
        """Move the running statistics by those of all blocks, (blocks, C), as if one came after the other."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count = len(means)
        self.num_batches_tracked += count
        if self.momentum is None:  # the mean over all blocks ever seen
            shares = means.new_ones(count, 1) / self.num_batches_tracked
            kept = 1 - count / self.num_batches_tracked
        else:
            places = torch.arange(count - 1, -1, -1, device=means.device, dtype=means.dtype)
            shares = self.momentum * (1 - self.momentum) ** places[:, None]
            kept = torch.tensor((1 - self.momentum) ** count)
        self.running_mean.mul_(kept).add_((shares * means).sum(0))
        self.running_var.mul_(kept).add_((shares * variances).sum(0))

    def extra_repr(self) -> str:
        """As of `nn.BatchNorm2d`, and the block."""
        return f"{super().extra_repr()}, block_size={self.block_size}"


def convert_ghost_batch_norm(model: nn.Module, block_size: int | None = None) -> nn.Module:
    """Replace every `nn.BatchNorm2d` below a model by ghost batch norm with the same weights and statistics.

    Parameters and buffers are the very same tensors under the same names, so that optimizers, ties and saved states
    stay what they were.

    Args:
        model: changed in place; a batch norm itself is replaced by what is returned.
        block_size: as of `GhostBatchNorm2d`.

    >>> from torchvision.models import resnet18
    >>> model = convert_ghost_batch_norm(resnet18(), block_size=32)
    >>> sum(isinstance(module, GhostBatchNorm2d) for module in model.modules())
    20
    """
    if type(model) is nn.BatchNorm2d:
        ghost = GhostBatchNorm2d(
            model.num_features,
            block_size,
            eps=model.eps,
            momentum=model.momentum,
            affine=model.affine,
            track_running_stats=model.track_running_stats,
        )
        ghost._parameters, ghost._buffers = model._parameters, model._buffers
        ghost.train(model.training)
        return ghost
    for name, child in model.named_children():
        converted = convert_ghost_batch_norm(child, block_size)
        if converted is not child:
            setattr(model, name, converted)
    return model
