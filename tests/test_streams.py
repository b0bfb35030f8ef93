import itertools
import random
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from seqba import copies_of_pass, copy_streams, current_copies, repeat_batch, shared_draws, unfold
from tiny_models import FAMILIES, bart, batch_for, enable_checkpointing, gpt2, gradients, marian, summed_nll, t5

M, B = 4, 3


def masks(module, x, copies, **more):
    """What a random module makes of M copies of x in one pass, (K, B, ...)."""
    with copy_streams(copies, seed=1, update=2, **more):
        return unfold(module(repeat_batch(x, len(copies))), len(copies))


def plan_gradients(model, batch, copies_per_pass, *, update=7, shard=0):
    """Gradients of the loss summed over M copies, in passes of K."""
    model.train()
    model.zero_grad()
    for start in range(0, M, copies_per_pass):
        copies = tuple(range(start, min(start + copies_per_pass, M)))
        with copy_streams(copies, seed=1, update=update, shard=shard, num_samples=B):
            summed_nll(model, repeat_batch(batch, len(copies))).backward()
    return gradients(model)


def assert_same(a, b):
    assert a.keys() == b.keys()
    scale = max(float(g.abs().max()) for g in a.values())
    for name in a:
        torch.testing.assert_close(a[name] / scale, b[name] / scale, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_fused_equals_accumulated_on_a_model_nobody_rewrote(family, attention):
    model = FAMILIES[family](attn_implementation=attention)
    batch = batch_for(family)
    fused = plan_gradients(model, batch, M)
    for copies_per_pass in (1, 3):
        assert_same(fused, plan_gradients(model, batch, copies_per_pass))
    other = plan_gradients(model, batch, M, update=8)
    assert any(not torch.equal(fused[name], other[name]) for name in fused)


@pytest.mark.parametrize("build", [marian, bart])
def test_layerdrop_is_one_draw_for_all_copies_and_plans(build):
    model = build(encoder_layerdrop=0.5, decoder_layerdrop=0.5)
    batch = batch_for("marian")
    skipped = set()
    for update in range(6):
        fused = plan_gradients(model, batch, M, update=update)
        assert_same(fused, plan_gradients(model, batch, 1, update=update))
        skipped.add(len(fused))
    assert len(skipped) > 1  # some update did drop a layer


@pytest.mark.trap(25)
@pytest.mark.parametrize("build", [marian, t5, gpt2])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_replays_the_same_masks(build, reentrant):
    model, batch = build(), batch_for(build.__name__)
    want = plan_gradients(model, batch, M)
    enable_checkpointing(model, use_reentrant=reentrant)
    assert_same(want, plan_gradients(model, batch, M))
    assert_same(want, plan_gradients(model, batch, 1))


@pytest.mark.trap(25)
@pytest.mark.parametrize("streams", [True, False])
def test_a_checkpointed_bias_gradient_is_the_forward_keep_mask(streams):
    bias = nn.Parameter(torch.zeros(2 * B, 64))

    def block(x):
        return nn.functional.dropout(x + bias, 0.5)

    def run():
        out = checkpoint(block, torch.ones(2 * B, 64), use_reentrant=False)
        torch.rand(2)  # the generator moves on between forward and backward
        out.sum().backward()
        return out

    if streams:
        with copy_streams((0, 1), seed=3, update=1):
            out = run()
    else:
        with copies_of_pass((0, 1)):
            out = run()
    assert torch.equal(bias.grad, (out != 0) * 2.0)


ATTENTION_ALONE = {  # dropout on attention weights, and nowhere else
    "marian": {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.5},
    "llama": {"dropout": 0.5},
}


@pytest.mark.trap(27)
@pytest.mark.parametrize("backend", ["eager", SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("family", ATTENTION_ALONE)
def test_copies_differ_in_training_and_agree_in_evaluation_on_every_attention_backend(backend, streams, family):
    attention = "eager" if backend == "eager" else "sdpa"
    model = FAMILIES[family](**ATTENTION_ALONE[family], attn_implementation=attention)
    batch = repeat_batch(batch_for(family), 2)
    chosen = nullcontext() if backend == "eager" else sdpa_kernel([backend, SDPBackend.MATH], set_priority=True)
    context = copy_streams((0, 1), seed=0, update=1) if streams else copies_of_pass((0, 1))
    with chosen, context:
        first, second = unfold(model.train()(**batch).logits, 2)
        same_first, same_second = unfold(model.eval()(**batch).logits, 2)
    assert not torch.allclose(first, second)
    assert torch.equal(same_first, same_second)


@pytest.mark.trap(47)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("time", [4, 5, 12])  # 4 and 12 could be cut by four copies too, along the wrong axis
def test_dropout_between_recurrent_layers_is_cut_by_rows_not_by_time(kind, batch_first, time):
    network = kind(6, 8, num_layers=3, dropout=0.5, batch_first=batch_first, bidirectional=True)
    rows = 0 if batch_first else 1
    x = torch.randn(B, time, 6) if batch_first else torch.randn(time, B, 6)
    with copy_streams(range(M), seed=1, update=2, num_samples=B):
        fused = network(repeat_batch(x, M, dim=rows))[0]
    for copy in range(M):
        with copy_streams((copy,), seed=1, update=2, num_samples=B):
            alone = network(x)[0]
        torch.testing.assert_close(unfold(fused, M, dim=rows)[copy], alone)


@pytest.mark.trap(47)
def test_recurrent_dropout_over_a_packed_sequence_is_refused_by_name():
    network = nn.LSTM(6, 8, num_layers=2, dropout=0.5)
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 6), torch.randn(3, 6)] * 2, enforce_sorted=False)
    with pytest.raises(RuntimeError, match="PackedSequence"), copy_streams((0, 1), seed=1, update=2):
        network(packed)
    with copy_streams((0,), seed=1, update=2):
        assert network(packed)[0].data.shape == (16, 8)


DRAWS = {
    "dropout": lambda x: nn.functional.dropout(x, 0.5),
    "dropout in place": lambda x: nn.functional.dropout(x.clone(), 0.5, inplace=True),
    "dropout1d": lambda x: nn.functional.dropout1d(x, 0.5),
    "alpha_dropout": lambda x: nn.functional.alpha_dropout(x, 0.5, training=True),
    "feature_alpha_dropout": lambda x: nn.functional.feature_alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x: nn.functional.rrelu(-x, training=True),
    "gumbel_softmax": lambda x: nn.functional.gumbel_softmax(x),
    "bernoulli of probabilities": lambda x: torch.bernoulli(torch.full_like(x, 0.5)),
    "bernoulli with p": lambda x: torch.bernoulli(x, 0.5),
    "rand_like": torch.rand_like,
    "randn_like": torch.randn_like,
    "randint_like": lambda x: torch.randint_like(x, 1000),
    "rand": lambda x: torch.rand(x.shape),
    "randn": lambda x: torch.randn(x.shape),
    "randint": lambda x: torch.randint(3, 1000, x.shape),
    "normal of means": lambda x: torch.normal(x, 1.0),
    "normal of stds": lambda x: torch.normal(0.0, x),
    "normal of a size": lambda x: torch.normal(0.0, 1.0, x.shape),
    "uniform_": lambda x: x.clone().uniform_(),
    "normal_": lambda x: x.clone().normal_(),
    "exponential_": lambda x: x.clone().exponential_(),
    "geometric_": lambda x: x.clone().geometric_(0.1),
    "cauchy_": lambda x: x.clone().cauchy_(),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "random_": lambda x: x.clone().random_(1000),
    "poisson": lambda x: torch.poisson(x * 9),
    "multinomial": lambda x: torch.multinomial(x.flatten(1), 5),
    "native_dropout": lambda x: torch.native_dropout(x, 0.5, True)[0],
    "transposed storage": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1).normal_(),
    "one number a row": lambda x: torch.rand(x.shape[0]),
    "stochastic depth by row": lambda x: x * x.new_empty(x.shape[0], 1, 1).bernoulli_(0.5),
    "under inference mode": torch.inference_mode()(lambda x: nn.functional.dropout(x, 0.5)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_kind_of_draw_is_per_copy_and_the_same_in_every_plan(name):
    draw, x = DRAWS[name], torch.linspace(0.1, 0.9, B * 5 * 16).view(B, 5, 16)
    fused = masks(draw, x, range(M), num_samples=B)
    for copy in range(M):
        assert torch.equal(fused[copy], masks(draw, x, (copy,), num_samples=B)[0]), copy
        assert not torch.equal(fused[copy], fused[(copy + 1) % M])
    assert torch.equal(masks(draw, x, (3, 1), num_samples=B)[0], fused[3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masks_do_not_depend_on_who_else_is_in_the_pass_in_any_precision(dtype):
    x = torch.ones(B, 33, dtype=dtype)
    fused = masks(nn.Dropout(0.3), x, range(M))
    assert torch.equal(fused[2], masks(nn.Dropout(0.3), x, (2,))[0])


def test_seed_update_shard_and_copy_all_make_other_masks():
    def mask(copy=0, **key):
        with copy_streams((copy,), **{"seed": 1, "update": 2, "shard": 0, **key}):
            return torch.rand(B, 40)

    base = mask()
    for other in (mask(copy=1), mask(seed=2), mask(update=3), mask(shard=1)):
        assert not torch.equal(base, other)
    assert torch.equal(base, mask())
    keys = itertools.product((1, 2, 3), (1, 2, 3), (0, 1, 2), (0, 1, 2))  # their sums and products coincide
    found = {tuple(mask(seed=s, update=u, shard=n, copy=m).flatten().tolist()) for s, u, n, m in keys}
    assert len(found) == 81


def test_masks_keep_the_right_share_and_are_uncorrelated_between_copies():
    kept = masks(nn.Dropout(0.2), torch.ones(8, 4_000), range(M)) != 0
    n = 8 * 4_000
    for m in range(M):
        assert abs(float(kept[m].float().mean()) - 0.8) < 4 * (0.16 / n) ** 0.5
        for other in range(m):
            pair = torch.corrcoef(torch.stack([kept[m].flatten(), kept[other].flatten()]).float())
            assert abs(float(pair[0, 1])) < 4 / n**0.5


def test_one_number_a_copy_is_the_same_fused_and_alone():
    def number(copies):
        with copy_streams(copies, seed=1, update=2, num_samples=B):
            return torch.rand(len(current_copies()))

    fused = number(range(M))
    assert len(set(fused.tolist())) == M
    assert torch.equal(torch.cat([number((copy,)) for copy in range(M)]), fused)


def test_scalar_draws_and_draws_stated_as_shared_are_one_for_all_copies_and_plans():
    def numbers(copies):
        with copy_streams(copies, seed=1, update=2, num_samples=B):
            scalar = torch.rand([])
            with shared_draws():
                return scalar, torch.rand(1), torch.rand(7, 5), torch.randperm(9), torch.rand(len(copies) * B, 2)[:B]

    for fused, alone in zip(numbers((0, 1)), numbers((3,)), strict=True):
        assert torch.equal(fused, alone)


def test_the_generators_outside_are_as_before():
    state = torch.get_rng_state()
    with copy_streams((0, 1), seed=1, update=2):
        torch.rand(4, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_told_apart_by_copy_is_refused_by_name():
    def within(draw, **more):
        with copy_streams((0, 1, 2), seed=1, update=2, **more):
            return draw()

    with pytest.raises(RuntimeError, match=r"aten\.rand\.default draws a mask of shape \(1, 5\).*rows of 3 copies"):
        within(lambda: torch.rand(1, 5))
    with pytest.raises(RuntimeError, match=r"shape \(7, 5\)"):
        within(lambda: torch.rand(7, 5))
    with pytest.raises(RuntimeError, match=r"3 copies of 4 samples"):
        within(lambda: torch.rand(6, 5), num_samples=4)
    assert within(lambda: torch.rand(3, 5), num_samples=4).shape == (3, 5)  # a mask a copy
    with pytest.raises(RuntimeError, match=r"shape \(1,\)"):
        within(lambda: torch.rand(1))
    with pytest.raises(RuntimeError, match=r"aten\.multinomial\.default has no rows"):
        within(lambda: torch.multinomial(torch.ones(24), 5))
    with pytest.raises(RuntimeError, match=r"aten\.randperm"):
        within(lambda: torch.randperm(6))
    with pytest.raises(RuntimeError, match="a generator that the model passes itself"):
        within(lambda: torch.rand(6, generator=torch.Generator()))
    with pytest.raises(RuntimeError, match=r"aten\.rand\.out"):
        within(lambda: torch.rand(6, 2, out=torch.empty(6, 2)))


@pytest.mark.parametrize(("module", "draw"), [("Python's random", random.random), ("numpy.random", np.random.rand)])
def test_numbers_from_numpy_or_python_are_refused_on_leaving(module, draw):
    with pytest.raises(RuntimeError, match=module), copy_streams((0,), seed=1, update=2):
        draw()


def test_modules_learn_the_copies_of_the_pass_and_only_inside_it():
    assert current_copies() is None
    with copies_of_pass((2, 3)):
        assert current_copies() == (2, 3)
    with copy_streams((1,), seed=0, update=1):
        assert current_copies() == (1,)
        with pytest.raises(RuntimeError, match="passes do not nest"), copies_of_pass((0,)):
            pass
    assert current_copies() is None
    for wrong in ((), (0, 0), (-1,)):
        with pytest.raises(ValueError, match="copies must be distinct numbers from 0"), copies_of_pass(wrong):
            pass
    with (
        pytest.raises(ValueError, match="num_samples must be at least 1"),
        copy_streams((0,), seed=1, update=1, num_samples=0),
    ):
        pass


def test_an_error_inside_is_not_hidden_and_leaves_everything_as_before():
    state = torch.get_rng_state()

    def fail():
        random.random()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), copy_streams((0, 1), seed=1, update=2):
        fail()
    assert current_copies() is None
    assert torch.equal(torch.get_rng_state(), state)
