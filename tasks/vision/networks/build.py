"""A classifier by its name, and its parameters in groups of equal weight decay."""

from __future__ import annotations

import difflib
import re
from typing import Any

import torchvision
from torch import nn

from tasks.cli.errors import UserError
from tasks.vision.networks.amoebanet import amoebanet
from tasks.vision.networks.darts import darts
from tasks.vision.networks.densenet_cifar import DenseNetCifar
from tasks.vision.networks.mobilenet import MobileNetV1
from tasks.vision.networks.resnet_cifar import ResNetCifar
from tasks.vision.networks.vgg_cifar import vgg16_cifar
from tasks.vision.networks.wide_resnet import WideResNet

_WITH_AUXILIARIES = ("googlenet", "inception_v3")  # of torchvision: classifiers beside the last one
_OWN = (
    "resnet44", "vgg16-cifar", "wrn28-10", "densenet100-12", "densenet-bc100-12", "darts", "amoebanet", "mobilenet-v1"
)  # fmt: skip


def build_model(name: str, num_classes: int) -> nn.Module:
    """Make a network with new weights: images (N, 3, H, W) -> logits (N, num_classes).

    Args:
        name: for 32x32 images `resnetD` with D = 6n + 2 layers (`resnet44`), `vgg16-cifar`, `wrnD-K` of D = 6n + 4
            layers (`wrn28-10`), `densenetL-K` and `densenet-bcL-K` (`densenet100-12`), `darts`, `amoebanet` of width
            128 or `amoebanet-W`; `mobilenet-v1`, `torchvision/NAME` or `timm/NAME`. `darts` and `amoebanet` give an
            auxiliary head's logits too in training mode.
        num_classes: at least 2.

    Raises:
        UserError: there is no such network, or too few classes.

    >>> sum(parameter.numel() for parameter in build_model("resnet44", 10).parameters())
    658586
    """
    if num_classes < 2:
        raise UserError(f"a classifier needs at least 2 classes, got {num_classes}")
    family, _, member = name.partition("/")
    if family == "torchvision" and member:
        known = torchvision.models.list_models(module=torchvision.models)
        return _make(torchvision.models.get_model, name, member, known, num_classes)
    if family == "timm" and member:
        try:
            import timm
        except ImportError:
            raise UserError(f"{name} needs timm: python -m pip install timm") from None
        return _make(timm.create_model, name, member, timm.list_models(), num_classes)
    try:
        if match := re.fullmatch(r"resnet(\d+)", name):
            return ResNetCifar(int(match[1]), num_classes)
        if match := re.fullmatch(r"wrn(\d+)-(\d+)", name):
            return WideResNet(int(match[1]), int(match[2]), num_classes)
        if match := re.fullmatch(r"densenet(-bc)?(\d+)-(\d+)", name):
            return DenseNetCifar(int(match[2]), int(match[3]), num_classes, bottleneck=match[1] is not None)
    except ValueError as error:
        elsewhere = f"; torchvision/{name} is for large images" if name.startswith("resnet") else ""
        raise UserError(f"--network {name}: {error}{elsewhere}") from None
    if name == "darts":
        return darts(num_classes)
    if match := re.fullmatch(r"amoebanet(?:-([1-9]\d*))?", name):
        return amoebanet(num_classes, int(match[1] or 128))
    if name == "vgg16-cifar":
        return vgg16_cifar(num_classes)
    if name == "mobilenet-v1":
        return MobileNetV1(num_classes)
    raise UserError(f"there is no network {name!r}; known are {', '.join(_OWN)}, torchvision/NAME and timm/NAME")


def parameter_groups(model: nn.Module, weight_decay: float, decay_bias_and_norm: bool) -> list[dict[str, Any]]:
    """The parameters for an optimizer: all with one weight decay, or biases and normalisation (one axis) with none."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_bias_and_norm:
        return [{"params": parameters, "weight_decay": weight_decay}]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


def _make(make: Any, name: str, member: str, known: list[str], num_classes: int) -> nn.Module:
    if member not in known:
        near = difflib.get_close_matches(member, known, n=3, cutoff=0.5)
        raise UserError(f"there is no network {name!r}" + (f"; near are {', '.join(near)}" if near else ""))
    options = {"aux_logits": False, "init_weights": True} if member in _WITH_AUXILIARIES else {}
    model: nn.Module = make(member, num_classes=num_classes, **options)
    return model
