"""VGG16 with batch norm for 32x32 images."""

from __future__ import annotations

from torch import nn
from torchvision.models import vgg16_bn


def vgg16_cifar(num_classes: int, dropout: float = 0.5) -> nn.Module:
    """Simonyan and Zisserman 2015, configuration D with batch norm; behind it 512-4096-4096-classes, 33.65 million.

    The five poolings leave one pixel of 32x32 images. The classifier's dropout is part of T.
    """
    model = vgg16_bn(num_classes=num_classes, dropout=dropout)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier[0] = nn.Linear(512, 4_096)
    nn.init.normal_(model.classifier[0].weight, 0, 0.01)
    nn.init.zeros_(model.classifier[0].bias)
    return model
