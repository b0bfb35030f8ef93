"""Ghost batch norm against torch's own, against a slow float64 twin, and its laws about copies."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from seqba import copies_of_pass, repeat_batch
from seqba.modules import GhostBatchNorm2d, convert_ghost_batch_norm

C, SIZE = 3, (4, 5)


def a_layer(block_size, seed=1, **options):
    torch.manual_seed(seed)
    layer = GhostBatchNorm2d(C, block_size, **options)
    if layer.affine:
        nn.init.uniform_(layer.weight, 0.5, 2)
        nn.init.normal_(layer.bias)
    return layer


def twin(x, blocks, weight, bias, eps=1e-5):
    """Each block by its own statistics, written from the definition in float64."""
    out = []
    for rows in blocks:
        block = x[rows].double()
        mean = block.mean((0, 2, 3), keepdim=True)
        variance = (block - mean).square().mean((0, 2, 3), keepdim=True)
        out.append((block - mean) / (variance + eps).sqrt() * weight.double()[:, None, None] + bias[:, None, None])
    return torch.cat(out)


@pytest.mark.parametrize(
    ("rows", "copies", "block_size", "sizes"),
    [
        (12, 1, 4, [4, 4, 4]),
        (11, 1, 4, [6, 5]),
        (7, 1, 8, [7]),
        (24, 3, 4, [4] * 6),
        (21, 3, 3, [4, 3] * 3),
        (24, 3, None, [8, 8, 8]),
    ],
)
def test_a_block_is_normalised_by_itself_and_holds_rows_of_one_copy(rows, copies, block_size, sizes):
    layer, x = a_layer(block_size), torch.randn(rows, C, *SIZE) * 3 + 2
    x.requires_grad_()
    blocks = torch.arange(rows).split(sizes)
    want = twin(x, blocks, layer.weight, layer.bias)
    direction = torch.randn(want.shape)
    want_gradients = torch.autograd.grad((want * direction).sum(), [x, layer.weight, layer.bias])
    with copies_of_pass(range(copies)):
        got = layer(x)
    torch.testing.assert_close(got, want.float())
    gradients = torch.autograd.grad((got * direction).sum(), [x, layer.weight, layer.bias])
    for gradient, wanted in zip(gradients, want_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.trap(17)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False}])
@pytest.mark.parametrize("block_size", [6, 100, None])
def test_with_one_copy_and_a_block_of_the_whole_batch_it_is_torchs_batch_norm(momentum, options, block_size):
    ghost, plain = a_layer(block_size, momentum=momentum, **options), nn.BatchNorm2d(C, momentum=momentum, **options)
    plain.load_state_dict(ghost.state_dict())
    for mode in (True, True, False):
        x = torch.randn(6, C, *SIZE) + 1
        torch.testing.assert_close(ghost.train(mode)(x), plain.train(mode)(x))
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(ghost.state_dict()[name], value, msg=name)


@pytest.mark.trap(16)
@pytest.mark.trap(17)
@pytest.mark.parametrize("samples", [6, 7])  # blocks of 3 and 3, of 4 and 3
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("plan", [[(0, 1, 2, 3)], [(0, 1), (2, 3)], [(0,), (1,), (2,), (3,)], [(0, 1, 2), (3,)]])
def test_no_plan_changes_outputs_or_running_statistics(plan, momentum, samples):
    x = torch.randn(4, samples, C, *SIZE)  # four copies
    whole, parts = a_layer(3, momentum=momentum), a_layer(3, momentum=momentum)
    with copies_of_pass(range(4)):
        want = whole(x.flatten(0, 1))
    got = []
    for copies in plan:
        with copies_of_pass(copies):
            got.append(parts(x[list(copies)].flatten(0, 1)))
    torch.testing.assert_close(torch.cat(got), want)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, msg=name)
    assert int(whole.num_batches_tracked) == 8


@pytest.mark.trap(16)
def test_copies_of_a_sample_never_share_a_block_so_that_the_variance_is_that_of_the_batch():
    images = torch.randn(16, C, 1, 1).expand(16, C, *SIZE) * 3  # all variance lies between the images
    x = images.contiguous()
    one, four = a_layer(4, momentum=1.0), a_layer(4, momentum=1.0)
    one(x)
    with copies_of_pass(range(4)):
        four(repeat_batch(x, 4))
    torch.testing.assert_close(four.running_var, one.running_var)
    assert (four.running_var / x.var((0, 2, 3))).sub(1).abs().max() < 0.8
    sample_major = x.repeat_interleave(4, 0)  # the layout that the law is against: blocks of one image
    wrong = a_layer(4, momentum=1.0)
    wrong(sample_major)
    assert wrong.running_var.max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_other_types_and_memory_formats_give_the_same(dtype, memory_format):
    x = torch.randn(8, C, *SIZE)
    layer = a_layer(4)
    want = copy.deepcopy(layer)(x)
    if dtype == torch.float64:
        layer = layer.double()
    got = layer(x.to(dtype).contiguous(memory_format=memory_format))
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, rtol=3e-2, atol=3e-2)
    assert layer.running_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_a_model_is_converted_with_its_weights_and_keys_and_without_a_change_at_evaluation():
    model = resnet18(num_classes=3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = [id(parameter) for parameter in model.parameters()]
    x = torch.randn(4, 3, 32, 32)
    want = model.eval()(x)
    converted = convert_ghost_batch_norm(model, 2)
    assert converted is model
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert list(model.state_dict()) == list(before)
    torch.testing.assert_close(model.eval()(x), want, rtol=0, atol=0)
    assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
    plain = nn.BatchNorm2d(C, eps=1e-3, momentum=None).eval()
    alone = convert_ghost_batch_norm(plain, 2)
    assert isinstance(alone, GhostBatchNorm2d)
    assert (alone.eps, alone.momentum, alone.training, alone.weight) == (1e-3, None, False, plain.weight)


def test_what_cannot_be_normalised_is_refused():
    with pytest.raises(ValueError, match="block_size must be at least 2, got 1"):
        GhostBatchNorm2d(C, 1)
    with copies_of_pass((0, 1)), pytest.raises(ValueError, match="7 rows are no multiple of the pass's 2 copies"):
        a_layer(2)(torch.randn(7, C, *SIZE))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        a_layer(2)(torch.randn(1, C, 1, 1))
    with pytest.raises(ValueError, match="expected 4D input"):
        a_layer(2)(torch.randn(3, C))


def test_batch_norms_of_other_classes_and_of_two_names_are_converted_too():
    from timm.layers import BatchNormAct2d

    model = nn.ModuleDict({"one": BatchNormAct2d(C), "two": nn.BatchNorm2d(C)})
    model["three"] = model["two"]
    x = torch.randn(8, C, *SIZE)
    want = torch.cat([copy.deepcopy(model["one"])(part) for part in x.chunk(2)])
    convert_ghost_batch_norm(model, 2)
    assert model["three"] is model["two"]
    assert all(isinstance(layer, GhostBatchNorm2d) for layer in model.values())
    convert_ghost_batch_norm(model, 4)  # again, with another size
    torch.testing.assert_close(model["one"](x), want)  # with its activation
    torch.testing.assert_close(copy.deepcopy(model["one"]).eval()(x), model["one"].eval()(x))
