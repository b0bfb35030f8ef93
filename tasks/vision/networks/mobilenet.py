"""MobileNet v1 (Howard et al. 2017, "MobileNets: Efficient Convolutional Neural Networks for Mobile Vision")."""

from __future__ import annotations

from torch import Tensor, nn

# output channels and stride of each pair of a depthwise and a pointwise convolution; table 1
_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1_024, 2), (1_024, 1))


class MobileNetV1(nn.Module):
    """Depthwise separable convolutions, width 1: 4.2 million parameters with 1 000 classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers = [*_convolution(3, 32, 3, stride=2)]
        in_channels = 32
        for channels, stride in _PAIRS:
            layers += _convolution(in_channels, in_channels, 3, stride=stride, groups=in_channels)
            layers += _convolution(in_channels, channels, 1)
            in_channels = channels
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(in_channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, 3, H, W) -> logits (N, classes)."""
        return self.fc(self.features(images).mean((2, 3)))


def _convolution(in_channels: int, channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, channels, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    ]
