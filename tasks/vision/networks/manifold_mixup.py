"""Manifold mixup: the layers of residual networks in front of which rows are mixed, and which of them an update has.

Verma et al. 2019, "Manifold Mixup: Better Representations by Interpolating Hidden States" (arXiv:1806.05236).
"""

from __future__ import annotations

import numpy as np
import torchvision
from torch import nn

from tasks.cli.errors import UserError
from tasks.vision.networks.resnet_cifar import ResNetCifar
from tasks.vision.networks.wide_resnet import WideResNet


def mixing_layers(model: nn.Module, name: str) -> list[nn.Module]:
    """The network itself, so that images are mixed, and the begin of its second and of its third stage.

    Raises:
        UserError: no residual network.
    """
    if isinstance(model, torchvision.models.ResNet):
        return [model, model.layer2, model.layer3]
    if isinstance(model, (ResNetCifar, WideResNet)):
        stage = len(model.blocks) // 3
        return [model, model.blocks[stage], model.blocks[2 * stage]]
    raise UserError(
        f"--manifold-mixup: {name} is no residual network; take resnet44, wrn28-10 or torchvision/resnet50, or leave "
        "it out"
    )


def mixing_layer(seed: int, update: int, num_layers: int) -> int:
    """The index of an update's layer, each as probable: the same in all its passes and on all ranks."""
    return int(np.random.default_rng((seed, update)).integers(num_layers))
