"""Densely connected networks for 32x32 images (Huang et al. 2017, "Densely Connected Convolutional Networks", §3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Convolution(nn.Sequential):
    """Norm, ReLU, convolution."""

    def __init__(self, in_channels: int, channels: int, size: int) -> None:
        super().__init__(
            nn.BatchNorm2d(in_channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(in_channels, channels, size, padding=size // 2, bias=False),
        )


class _DenseLayer(nn.Module):
    def __init__(self, in_channels: int, growth: int, bottleneck: bool) -> None:
        super().__init__()
        layers = [_Convolution(in_channels, 4 * growth, 1), _Convolution(4 * growth, growth, 3)]
        self.layers = nn.Sequential(*layers) if bottleneck else _Convolution(in_channels, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


class DenseNetCifar(nn.Module):
    """A convolution, three blocks of dense layers with a transition between each two, a linear layer; table 2.

    torchvision's has the bottleneck always, and a stem for large images.

    Args:
        depth: L, 3n + 4 with n layers in a block (6n + 4 with bottlenecks).
        growth: k, the channels that each layer adds.
        num_classes: of the linear layer.
        bottleneck: the variant BC: a 1x1 convolution to 4k channels before each 3x3 one, and transitions that keep
            half of the channels. 100 layers of growth 12 have 7.0 million parameters without it and 0.8 with it.

    Raises:
        ValueError: another depth, or a growth below 1.
    """

    def __init__(self, depth: int, growth: int, num_classes: int, bottleneck: bool = False) -> None:
        super().__init__()
        each = 6 if bottleneck else 3
        if depth < each + 4 or (depth - 4) % each or growth < 1:
            raise ValueError(
                f"depth and growth must be {each}n + 4 with n of at least 1 and at least 1, got {depth} and {growth}"
            )
        channels = 2 * growth if bottleneck else 16
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
        for block in range(3):
            if block:
                kept = channels // 2 if bottleneck else channels
                layers += [_Convolution(channels, kept, 1), nn.AvgPool2d(2)]
                channels = kept
            for _ in range((depth - 4) // each):
                layers.append(_DenseLayer(channels, growth, bottleneck))
                channels += growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(channels))
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        return self.fc(F.relu(self.features(images)).mean((2, 3)))
