"""Streams under models from the field: all plans give the same weights, or the model is refused by name."""

import copy
import logging

import field_models
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from seqba import StreamError, TrainStep, copy_streams, measure_draws, passes, repeat_batch, shared_draws
from seqba.draws.measured import UnmeasuredError
from seqba.modules import convert_ghost_batch_norm

M, B, T, D = 4, 3, 5, 6


def weights_of(model, plan, batch, *, m=M, dim=0, loss_of=None, updates=2):
    """The weights after some updates with K copies in a pass."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = TrainStep(
        Accelerator(cpu=True),
        model,
        optimizer,
        loss_fn=loss_of or (lambda model, rows: model(rows).square().sum()),
        count_fn=lambda batch: 1,
        num_copies=m,
        copies_per_pass=plan,
        copy_seed=7,
        take_copies=lambda batch, copies: repeat_batch(batch, len(copies), dim=dim),
    )
    for update in range(1, updates + 1):
        step([batch], update=update)
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_plans_agree(model, batch, *, m=M, tolerance=1e-4, **options):
    want = weights_of(model, m, batch, m=m, **options)
    moved = max(float((want[name] - p.detach()).abs().max()) for name, p in model.named_parameters())
    assert moved > 0
    for plan in range(1, m):
        for name, weight in weights_of(model, plan, batch, m=m, **options).items():
            assert float((weight - want[name]).abs().max()) < tolerance * moved, (plan, name)


# ---- architectures of transformers

REFUSED = {
    "reformer": "two passes of ReformerModel from the same seed differ",
    "switch_transformers": "experts",
    "wav2vec2 with masks": "the model drew from numpy.random",
}
# where a time axis, a table of positions or heads in front of rows has the size of the copies' rows; a draw a layer
QUICK = ("deberta", "fsmt", "xlnet", "marian with layerdrop", "reformer", "switch_transformers", "wav2vec2 with masks")


@pytest.mark.trap(49)
@pytest.mark.trap(50)
@pytest.mark.parametrize(("m", "size"), [(3, 1), (4, 2), (3, 3)])  # 8 words: time is as long as the rows of four copies
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in field_models.ARCHITECTURES],
)
@pytest.mark.filterwarnings("ignore")
def test_plans_agree_on_an_architecture_or_it_is_refused_by_name(name, m, size):
    model, batch = field_models.tiny(name), field_models.batch_of(name, size, time=8)
    options = {"m": m, "loss_of": field_models.loss_of, "updates": 1}
    if name in REFUSED:
        with pytest.raises(StreamError, match=REFUSED[name]):
            weights_of(model, m, batch, **options)
        return
    assert_plans_agree(model, batch, **options)


# ---- modules that are hostile to it


class Net(nn.Module):
    """A layer, something random, a layer."""

    def __init__(self, noise):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(D, D), nn.Linear(D, D)
        self.noise = noise if isinstance(noise, nn.Module) else Calls(noise)

    def forward(self, x):
        return self.last(self.noise(self.first(x).tanh()))


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def rows_of(size=B, time=T):
    return torch.randn(size, time, D, generator=torch.Generator().manual_seed(5))


def heads_behind(x):
    """Heads folded into rows, (B * H, T, D / H)."""
    heads = x.unflatten(2, (2, -1)).transpose(1, 2).flatten(0, 1)
    return nn.functional.dropout(heads, 0.3).unflatten(0, (-1, 2)).transpose(1, 2).flatten(2)


def dropped_table(x):
    """A table of as many rows as four copies of three samples have, dropped out for all of them."""
    return x + nn.functional.dropout(torch.ones(M * B, D), 0.3).mean(0)


def behind_a_coin(x):
    return nn.functional.dropout(x, 0.3) if torch.rand(()) < 0.5 else x


RIGHT = {
    "dropout": lambda x: nn.functional.dropout(x, 0.3),
    "heads folded into rows": heads_behind,
    "a dropped table": dropped_table,
    "one number": lambda x: x * torch.rand(1),
    "one number without axes": lambda x: x * torch.rand(()),
    "torch's own generator": lambda x: x * torch.rand(x.shape, generator=torch.default_generator),
    "normal of a mean without axes": lambda x: x + torch.normal(torch.tensor(0.0), torch.ones_like(x)),
    "normal of means of fewer axes": lambda x: x + torch.normal(torch.zeros(D), torch.ones_like(x)),
    "a permutation of the words": lambda x: x[:, torch.randperm(x.shape[1])],
    "a lone distribution": lambda x: x + torch.multinomial(torch.ones(9), 1),
    "a coin before a dropout": behind_a_coin,
    "codebooks in rows": lambda x: x + torch.rand(len(x) * 4, D).unflatten(0, (-1, 4)).sum(1)[:, None],
    "stochastic depth by row": lambda x: x * x.new_empty(len(x), 1, 1).bernoulli_(0.7),
    "stochastic depth by batch": lambda x: x * x.new_empty(1, 1, 1).bernoulli_(0.7),
    "in a place of another layout": lambda x: x.transpose(0, 1).clone().transpose(0, 1).normal_() + x,
}


@pytest.mark.trap(49)
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", RIGHT)
def test_plans_agree_whatever_the_sizes_of_a_draw(name, size):
    assert_plans_agree(Net(RIGHT[name]), rows_of(size, time=M * size))


@pytest.mark.trap(4)
@pytest.mark.trap(49)
@pytest.mark.parametrize("time", [T, M * B, 2 * M * B])
def test_plans_agree_where_time_stands_first(time):
    layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.3)  # (T, B, D)
    assert_plans_agree(layer, rows_of(time, B), dim=1)


def a_coin_a_row(x):
    return torch.stack([row * 2 if torch.rand(()) < 0.5 else row for row in x])


def until_all_are_large(x):
    noise = torch.rand(len(x), 1, 1)
    while bool((noise < 0.7).any()):
        noise = torch.where(noise < 0.7, torch.rand(len(x), 1, 1), noise)
    return x * noise


def experts(x):
    """Rows go to one of two by their values, and are dropped out there."""
    flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
    flat = nn.functional.dropout(flat, 0.3)
    chosen = flat[:, 0] > 0
    for where in (chosen, ~chosen):
        out[where] = nn.functional.dropout(flat[where], 0.3)
    return out.view_as(x)


def seeded_anew(x):
    torch.seed()
    return nn.functional.dropout(x, 0.3)


def drop_block(x):
    """Its normaliser is a mean over the whole pass."""
    kept = nn.functional.max_pool1d((torch.rand(x.shape) < 0.2).float(), 3, 1, 1) == 0
    return x * kept * kept.numel() / kept.sum()


def twins(x):
    """Both halves of `cat([x, x])` are set against each other: their masks stand in front of the copies."""
    one, other = nn.functional.dropout(torch.cat([x, x]), 0.3).chunk(2)
    return x + (one - other).square()


class Schedule(nn.Module):
    """Stronger with each forward."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return nn.functional.dropout(x, 0.1) * self.calls


class Counted(Schedule):
    def __init__(self):
        super().__init__()
        del self.calls
        self.register_buffer("calls", torch.zeros(()))


class OwnGenerator(nn.Module):
    def forward(self, x):
        generator = torch.Generator().manual_seed(len(x))
        return x * torch.rand(x.shape, generator=generator)


class _InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.rand_like(gradient)


WRONG = {
    "a coin a row": (a_coin_a_row, "noise draws .* how often it draws depends on the rows"),
    "rejection": (until_all_are_large, "noise dr(aws|ew) .* how often it draws depends on"),
    "experts": (experts, "does not hold the rows|they part at noise"),
    "a permutation of rows": (lambda x: x[torch.randperm(len(x))], r"aten\.randperm.* in noise draws \(3,\) .* \(6,\)"),
    "pairs of rows": (lambda x: x + torch.rand(len(x), len(x)).mean(), r"draws \(3, 3\) numbers .* \(6, 6\)"),
    "a row more": (lambda x: x * torch.rand(len(x) + 1)[1:, None, None], r"draws \(4,\) numbers .* and \(7,\) for two"),
    "torch.seed()": (seeded_anew, "two passes of Net from the same seed differ"),
    "DropBlock": (drop_block, "is not its copies one by one; they part at noise"),
    "twins": (twins, "is not its copies one by one; they part at noise"),
    "a count in an attribute": (Schedule(), "two passes of Net from the same seed differ"),
    "a count in a buffer": (Counted(), r"noise\.calls is moved by every pass"),
    "spectral norm": (spectral_norm(nn.Linear(D, D)), r"noise\.parametrizations\.weight\.0\._u is moved by every pass"),
    "a generator of its own": (OwnGenerator(), "a generator that the model passes itself"),
    "draws in backward alone": (_InBackward.apply, "draws in the backward pass and not in the forward pass"),
}


@pytest.mark.trap(49)
@pytest.mark.trap(50)
@pytest.mark.trap(51)
@pytest.mark.parametrize("plan", [1, M])
@pytest.mark.parametrize("name", WRONG)
def test_what_differs_between_plans_is_refused_by_name(name, plan):
    noise, message = WRONG[name]
    with pytest.raises(StreamError, match=message):
        weights_of(Net(noise), plan, rows_of())


class FromThirdUpdate(nn.Module):
    """Draws otherwise when its buffer says so: at update 3 for the first time."""

    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return self.draw(x) if float(x[0, 0, 0]) > 100 else nn.functional.dropout(x, 0.3)


@pytest.mark.trap(50)
@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda x: nn.functional.dropout(nn.functional.dropout(x, 0.2), 0.2), None),
        (lambda x: x * torch.rand(1), None),
        (a_coin_a_row, "noise draws .* how often it draws depends on the rows"),
        (lambda x: x + torch.rand(len(x), len(x)).mean(), "which cannot be told apart by copy"),
    ],
)
def test_a_draw_that_comes_late_is_looked_at_when_it_comes(draw, message):
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.last, self.noise = nn.Linear(D, D), FromThirdUpdate(draw)

        def forward(self, x):
            return self.last(self.noise(x))

    def weights(plan):
        model = Late()
        step = TrainStep(
            Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=1e-4),
            loss_fn=lambda model, rows: model(rows).square().sum(), count_fn=lambda batch: 1, num_copies=M,
            copies_per_pass=plan, copy_seed=7,
        )  # fmt: skip
        for update in range(1, 5):
            step([rows_of() + (1_000 if update == 3 else 0)], update=update)
        return model.last.weight.detach()

    if message is not None:
        for plan in (1, M):
            with pytest.raises(StreamError, match=message):
                weights(plan)
        return
    want = weights(M)
    for plan in (1, 3):
        torch.testing.assert_close(weights(plan), want, rtol=1e-4, atol=1e-5)


@pytest.mark.trap(50)
@pytest.mark.parametrize("late", [lambda x: x, lambda x: nn.functional.dropout(nn.functional.dropout(x, 0.2), 0.2)])
def test_draws_that_are_fewer_or_more_than_before_are_looked_at_too(late, monkeypatch):
    looks = []

    def looked(*args, **kwargs):
        looks.append(kwargs["update"])
        return measure_draws(*args, **kwargs)

    monkeypatch.setattr(passes, "measure_draws", looked)

    class Counting(FromThirdUpdate):
        def __init__(self, draw):
            super().__init__(draw)
            self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    model = Net(Counting(late))
    step = TrainStep(
        Accelerator(cpu=True), model, torch.optim.SGD(model.parameters(), lr=1e-4), num_copies=2, copy_seed=7,
        loss_fn=lambda model, rows: (model.last.weight.sum() * model.noise(rows)).square().sum(),
        count_fn=lambda batch: 1,
    )  # fmt: skip
    for update in range(1, 6):
        step([rows_of() + (1_000 if update in (3, 4) else 0)], update=update)
    assert looks == [1, 3]
    assert int(model.noise.passes) == 5  # a pass that is done again is first undone


@pytest.mark.trap(51)
def test_batch_norm_is_named_once_in_a_warning_and_ghost_blocks_are_not(caplog):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(64, 3))
    images = torch.randn(B, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.WARNING):
        weights_of(model, M, images)
    assert [r.getMessage()[:28] for r in caplog.records] == ["1 batch norms (BatchNorm2d) "]
    caplog.clear()
    assert_plans_agree(convert_ghost_batch_norm(model), images, tolerance=1e-3)
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:.torch.jit")  # a DeprecationWarning, later a FutureWarning
def test_plans_agree_on_a_model_with_a_scripted_part():
    assert_plans_agree(Net(torch.jit.script(nn.Sequential(nn.Dropout(0.3), nn.Tanh()))), rows_of())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
def test_a_nested_tensor_is_refused_by_name():
    def nested(x):
        return torch.nested.to_padded_tensor(nn.functional.dropout(torch.nested.nested_tensor(list(x)), 0.5), 0.0)

    with pytest.raises(StreamError, match="draws over a nested tensor"):
        weights_of(Net(nested), M, rows_of())


def test_the_look_leaves_everything_as_it_was():
    model = Net(nn.Sequential(nn.Dropout(0.3), nn.BatchNorm1d(T)))
    model.train()
    model.first.eval()
    x, before, state = rows_of(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    measure_draws(model, lambda copies: model(repeat_batch(x, len(copies))))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_draw_stated_as_shared_needs_no_axis():
    def shared(x):
        with shared_draws():
            return x + torch.rand(len(x), len(x))[0, 0]

    assert_plans_agree(Net(shared), rows_of())


def test_streams_by_hand_say_that_a_draw_was_not_looked_at():
    model, x = Net(RIGHT["dropout"]), rows_of()
    axes = measure_draws(model, lambda copies: model(repeat_batch(x, len(copies))))
    with (
        pytest.raises(UnmeasuredError, match="more often than in the passes that were looked at"),
        copy_streams((0,), seed=1, update=1, axes=axes),
    ):
        torch.rand(4)


@pytest.mark.parametrize("shape", [(M * B, D, M * B), (2 * M * B, D), (M * B * M, M * B)])
def test_streams_by_hand_refuse_sizes_that_can_be_read_in_two_ways(shape):
    with (
        pytest.raises(StreamError, match="more than one axis can hold their rows, or none"),
        copy_streams(range(M), seed=1, update=1, num_samples=B),
    ):
        torch.rand(shape)
