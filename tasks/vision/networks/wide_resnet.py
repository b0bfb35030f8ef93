"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis 2016, "Wide Residual Networks", table 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class PreactivationBlock(nn.Module):
    """Norm, ReLU and a 3x3 convolution, twice; where the shape changes, the shortcut is a 1x1 convolution."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        changes = stride > 1 or in_channels != channels
        self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        hidden = F.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(hidden)
        return self.conv2(F.relu(self.bn2(self.conv1(hidden)))) + shortcut


class WideResNet(nn.Module):
    """6n + 4 layers: a convolution, three stages of n blocks with 16k, 32k and 64k channels, a linear layer.

    Args:
        depth: 6n + 4.
        width: k; 28 layers with k = 10 have 36.5 million parameters.
        num_classes: of the linear layer.

    Raises:
        ValueError: another depth, or a width below 1.
    """

    def __init__(self, depth: int, width: int, num_classes: int) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or width < 1:
            raise ValueError(
                "depth and width must be 6n + 4 with n of at least 1 (10, 16, 22, 28, ...) and at least 1, got "
                f"{depth} and {width}"
            )
        blocks: list[nn.Module] = []
        in_channels = 16
        for channels in (16 * width, 32 * width, 64 * width):
            for i in range((depth - 4) // 6):
                blocks.append(PreactivationBlock(in_channels, channels, 2 if i == 0 and channels > 16 * width else 1))
                in_channels = channels
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(*blocks)
        self.bn = nn.BatchNorm2d(in_channels)
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        return self.fc(F.relu(self.bn(self.blocks(self.conv1(images)))).mean((2, 3)))
