"""Residual networks for 32x32 images (He et al. 2016, "Deep Residual Learning for Image Recognition", §4.2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without parameters: where the block shrinks, every other pixel, and zeros
    for the channels that are new (option A).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.new_channels = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, channels, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        return F.relu(out + shortcut)


class ResNetCifar(nn.Module):
    """6n + 2 layers: a convolution, three stages of n blocks with 16, 32 and 64 channels, a linear layer.

    Args:
        depth: 6n + 2; 44 has 0.66 million parameters.
        num_classes: of the linear layer.
    """

    def __init__(self, depth: int, num_classes: int) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"the depth must be 6n + 2 with n of at least 1 (8, 14, 20, ..., 44, 110), got {depth}")
        blocks: list[nn.Module] = []
        in_channels = 16
        for channels in (16, 32, 64):
            for i in range((depth - 2) // 6):
                blocks.append(BasicBlock(in_channels, channels, stride=2 if i == 0 and channels > 16 else 1))
                in_channels = channels
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        hidden = F.relu(self.bn1(self.conv1(images)))
        return self.fc(self.blocks(hidden).mean((2, 3)))
