"""Image classifiers: their sizes, what they compute, and how they are named."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from seqba import TrainStep
from seqba.modules import convert_ghost_batch_norm
from tasks.cli.errors import UserError
from tasks.vision import build_model
from tasks.vision.config import parse_config
from tasks.vision.loss import VisionLoss
from tasks.vision.networks import parameter_groups
from tasks.vision.networks.amoebanet import amoebanet
from tasks.vision.networks.resnet_cifar import BasicBlock
from tasks.vision.presets import DATA, PRESETS
from tasks.vision.train import training


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "classes", "millions"),
    [
        ("resnet20", 10, 0.27),
        ("resnet44", 10, 0.66),
        ("resnet110", 10, 1.73),
        ("vgg16-cifar", 10, 33.65),
        ("wrn28-10", 10, 36.48),
        ("densenet100-12", 10, 6.98),
        ("densenet-bc100-12", 10, 0.77),
        ("mobilenet-v1", 1_000, 4.23),
        ("torchvision/alexnet", 1_000, 61.10),
        ("torchvision/resnet50", 1_000, 25.56),
        ("timm/resnet18", 1_000, 11.69),
    ],
)
def test_networks_have_the_published_numbers_of_parameters(name, classes, millions):
    assert count(build_model(name, classes)) / 1e6 == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize(
    ("name", "parameters", "of_the_head"),
    [("darts", 3_349_342, 476_426), ("amoebanet", 37_490_058, 599_306), ("amoebanet-36", 3_145_078, 457_994)],
)
def test_networks_of_cells_have_the_published_numbers_of_parameters(name, parameters, of_the_head):
    model = build_model(name, 10)
    assert count(model.auxiliary) == of_the_head
    assert count(model) - of_the_head == parameters


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet8", 32),
        ("resnet14", 24),
        ("vgg16-cifar", 32),
        ("wrn10-2", 32),
        ("densenet16-4", 32),
        ("densenet-bc16-4", 32),
        ("mobilenet-v1", 64),
        ("torchvision/resnet18", 64),
    ],
)
def test_networks_give_a_logit_a_class_and_train_every_parameter(name, size):
    model = build_model(name, 7)
    logits = model(torch.randn(2, 3, size, size))
    assert logits.shape == (2, 7)
    logits.logsumexp(1).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_block_adds_what_its_shortcut_lets_through():
    block, x = BasicBlock(4, 8, stride=2).eval(), torch.randn(2, 4, 6, 6)
    nn.init.zeros_(block.bn2.weight)
    want = torch.zeros(2, 8, 3, 3)
    want[:, 2:6] = x[:, :, ::2, ::2]
    assert torch.equal(block(x), want.relu())


def test_a_cifar_resnet_is_the_network_of_the_paper():
    model = build_model("resnet20", 10).eval()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) + 1 == 20
    shapes = []
    for module in convolutions:
        module.register_forward_hook(lambda module, x, y: shapes.append(tuple(y.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(16, 32, 32)] * 7 + [(32, 16, 16)] * 6 + [(64, 8, 8)] * 6
    assert all(module.bias is None for module in convolutions)


def test_dropout_of_vgg_is_active_in_training_alone():
    model, x = build_model("vgg16-cifar", 10), torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    hidden = model.features(x).flatten(1)
    assert hidden.shape == (2, 512)
    first = F.relu(model.classifier[0](hidden))
    want = model.classifier[6](F.relu(model.classifier[3](first)))
    torch.testing.assert_close(model(x), want)


def test_biases_and_normalisation_are_a_group_without_weight_decay_unless_asked():
    model = build_model("resnet8", 10)
    decayed, free = parameter_groups(model, 1e-4, decay_bias_and_norm=False)
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))
    (every,) = parameter_groups(model, 5e-4, decay_bias_and_norm=True)
    assert len(every["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet45", r"the depth must be 6n \+ 2 .* got 45; torchvision/resnet45 is for large images"),
        ("wrn27-10", r"depth and width must be 6n \+ 4 .* got 27 and 10"),
        ("densenet-bc99-12", r"depth and growth must be 6n \+ 4 .* got 99 and 12"),
        ("resnet", "there is no network 'resnet'; known are resnet44, vgg16-cifar"),
        ("torchvision/resnet51", "there is no network 'torchvision/resnet51'; near are resnet"),
        ("timm/resnet19", "there is no network 'timm/resnet19'; near are resnet"),
        ("torchvision/", "there is no network 'torchvision/'"),
    ],
)
def test_an_unknown_network_is_named_with_near_ones(name, message):
    with pytest.raises(UserError, match=message):
        build_model(name, 10)


def test_one_class_is_refused_and_timm_is_asked_for_where_it_is_missing(monkeypatch):
    with pytest.raises(UserError, match="at least 2 classes, got 1"):
        build_model("resnet8", 1)
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="timm/resnet18 needs timm: python -m pip install timm"):
        build_model("timm/resnet18", 10)


def test_every_plan_gives_a_cell_network_without_drop_path_the_same_gradient():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(4, 3, 32, 32, generator=generator).double(), torch.arange(4)
    noise = torch.randn(3, 4, 3, 32, 32, generator=generator).double()
    gradients = []
    for copies_per_pass in (1, 2, 3):
        torch.manual_seed(0)
        model = convert_ghost_batch_norm(amoebanet(10, width=4, num_cells=3), None).double().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        found = []
        optimizer.step = lambda model=model, found=found: found.extend(p.grad.clone() for p in model.parameters())
        step = TrainStep(
            Accelerator(cpu=True),
            model,
            optimizer,
            loss_fn=lambda net, rows: VisionLoss(net)(rows)[0],
            count_fn=lambda batch: len(batch["labels"]),
            num_copies=3,
            copies_per_pass=copies_per_pass,
            take_copies=lambda batch, copies: {
                "images": torch.cat([batch["images"] + noise[copy] for copy in copies]),
                "labels": batch["labels"].repeat(len(copies)),
            },
        )
        step([{"images": images, "labels": labels}], update=1)
        gradients.append(found)
    assert all(len(found) for found in gradients)
    for found in gradients[1:]:
        for got, want in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif("SEQBA_DATA" not in os.environ, reason="SEQBA_DATA names no folder of data sets")
@pytest.mark.parametrize("preset", sorted(name for name in PRESETS if name in DATA))
def test_every_preset_of_cifar_10_does_five_updates_with_a_finite_loss(preset, tmp_path):
    few = "--batch-size 4 --ba-m 2 --train-images 40 --valid-images 10 --max-updates 9 --eval-every 100 --num-workers 0"
    options = parse_config(["--preset", preset, *few.split(), "--cpu", "--output-dir", str(tmp_path)])
    updates = training(options)
    losses = [float(next(updates)[0].loss) for _ in range(5)]
    assert all(map(math.isfinite, losses))
