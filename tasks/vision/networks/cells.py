"""Networks of searched cells for 32x32 images, as DARTS trains them (Liu et al. 2019, "DARTS", §3 and appendix A).

A cell has two inputs, the outputs of the two cells before it, and nodes; a node adds up two operations, each on an
input or an earlier node. A `Genotype` says which. The cells at one and two thirds of the depth halve the image and
double the channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

Edge = tuple[str, int]  # an operation, and the state that it reads: 0 and 1 are the inputs, 2 is the first node


@dataclass(frozen=True)
class Genotype:
    """Two cells: their edges, two for each node, and the states whose channels make the output."""

    normal: Sequence[Edge]
    normal_output: Sequence[int]
    reduction: Sequence[Edge]
    reduction_output: Sequence[int]


class CellNetwork(nn.Module):
    """A convolution, cells, a linear layer; and in training an auxiliary classifier behind the second reduction.

    Drop path (Larsson et al. 2017, "FractalNet") zeroes the outputs of operations that are no identities: each of them
    for each image by itself, so that copies differ. Its probability is 0 until `set_drop_path` sets it.

    Args:
        genotype: of the cells.
        width: channels of a node before the first reduction.
        num_cells: at least 3.
        num_classes: of the linear layer.
    """

    def __init__(self, genotype: Genotype, width: int, num_cells: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * width, 3, padding=1, bias=False), nn.BatchNorm2d(3 * width))
        before, last = 3 * width, 3 * width  # channels of the two states
        self.cells = nn.ModuleList()
        reductions = (num_cells // 3, 2 * num_cells // 3)
        for i in range(num_cells):
            reduces = i in reductions
            width *= 2 if reduces else 1
            cell = _Cell(genotype, before, last, width, reduces, follows_reduction=i - 1 in reductions)
            self.cells.append(cell)
            before, last = last, cell.channels
            if i == reductions[1]:
                self.auxiliary = _AuxiliaryHead(last, num_classes)
        self._auxiliary_after = reductions[1]
        self.fc = nn.Linear(last, num_classes)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Images (N, 3, 32, 32) -> logits (N, classes); in training mode these and the auxiliary ones."""
        auxiliary = None
        before = last = self.stem(images)
        for i, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            if self.training and i == self._auxiliary_after:
                auxiliary = self.auxiliary(last)
        logits = self.fc(last.mean((2, 3)))
        return logits if auxiliary is None else (logits, auxiliary)


def set_drop_path(model: nn.Module, probability: float) -> None:
    """Set the probability of zeroing in every drop path of a `CellNetwork`; the rest is scaled up to keep the mean."""
    for module in model.modules():
        if isinstance(module, StochasticDepth):
            module.p = probability


class _Cell(nn.Module):
    def __init__(
        self, genotype: Genotype, before: int, last: int, width: int, reduces: bool, follows_reduction: bool
    ) -> None:
        super().__init__()
        edges = genotype.reduction if reduces else genotype.normal
        self.output = genotype.reduction_output if reduces else genotype.normal_output
        self.channels = width * len(self.output)
        self.before = _Halve(before, width) if follows_reduction else _convolution(before, width, 1)
        self.last = _convolution(last, width, 1)
        self.sources = [source for _, source in edges]
        self.operations = nn.ModuleList(
            _operation(name, width, stride=2 if reduces and source < 2 else 1) for name, source in edges
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.before(before), self.last(last)]
        for i in range(0, len(self.sources), 2):
            one, other = (self.operations[j](states[self.sources[j]]) for j in (i, i + 1))
            states.append(one + other)
        return torch.cat([states[i] for i in self.output], 1)


class _Halve(nn.Module):
    """ReLU, half of the channels from the even pixels and half from the odd ones, norm."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(in_channels, channels // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(in_channels, channels - channels // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        return self.bn(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))


class _AuxiliaryHead(nn.Sequential):
    """A classifier of 8x8 pixels."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=3),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(inplace=True),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(768, num_classes),
        )


def _operation(name: str, width: int, stride: int) -> nn.Module:
    """An operation by its name in the papers, with its drop path."""
    if name == "identity" and stride == 1:
        return nn.Identity()
    kind, _, size = name.rpartition("_")
    k = 0 if name == "identity" else int(size.split("x")[0])
    made: nn.Module
    if name == "identity":
        made = _Halve(width, width)
    elif kind == "max_pool":
        made = nn.MaxPool2d(k, stride, k // 2)
    elif kind == "avg_pool":
        made = nn.AvgPool2d(k, stride, k // 2, count_include_pad=False)
    elif kind == "separable":
        made = nn.Sequential(_depthwise(width, k, stride), _depthwise(width, k))
    elif kind == "dilated":
        made = _depthwise(width, k, stride, dilation=2)
    else:  # 1x7 and 7x1
        made = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(width, width, (1, k), (1, stride), (0, k // 2), bias=False),
            nn.Conv2d(width, width, (k, 1), (stride, 1), (k // 2, 0), bias=False),
            nn.BatchNorm2d(width),
        )
    return nn.Sequential(made, StochasticDepth(0.0, "row"))


def _convolution(in_channels: int, channels: int, size: int) -> nn.Module:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(in_channels, channels, size, bias=False), nn.BatchNorm2d(channels))


def _depthwise(width: int, size: int, stride: int = 1, dilation: int = 1) -> nn.Module:
    padding = dilation * (size // 2)
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(width, width, size, stride, padding, dilation, groups=width, bias=False),
        nn.Conv2d(width, width, 1, bias=False),
        nn.BatchNorm2d(width),
    )
