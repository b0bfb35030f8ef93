import copy

import pytest
import torch
from torch import nn

import lstm_twin
import seqba.modules.weight_dropout
from seqba import copies_of_pass, copy_streams
from seqba.modules import (
    EmbeddingDropout,
    LockedDropout,
    WeightDropoutLSTM,
    Zoneout,
    activation_regularisation,
    temporal_activation_regularisation,
)
from seqba.modules.embedding_dropout import embedding_dropout
from seqba.modules.locked_dropout import locked_dropout
from seqba.modules.mask_scope import dropout_masks
from seqba.modules.weight_dropout import weight_dropout
from seqba.modules.zoneout import zoneout

INPUT, WIDTH = 3, 5
NAMES = ["weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"]


def layer(p=0.5, mask_scope="per_copy"):
    return WeightDropoutLSTM(INPUT, WIDTH, p, mask_scope)


# ---- locked dropout


def test_a_locked_mask_is_one_for_all_time_steps_and_differs_over_rows():
    dropped = locked_dropout(torch.ones(7, 4, 50), 0.5, training=True)
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert len(dropped[:, 0].unique(dim=0)) == 7
    assert dropped.is_contiguous()


@pytest.mark.trap(47)
def test_locked_masks_are_cut_by_rows_where_time_steps_are_as_many_as_rows():
    x = torch.ones(2, 6, 8)  # T = M * B
    with copy_streams(range(3), seed=1, update=1, num_samples=2):
        fused = locked_dropout(torch.cat([x] * 3), 0.5, training=True)
    for m in range(3):
        with copy_streams((m,), seed=1, update=1):
            alone = locked_dropout(x, 0.5, training=True)
        assert torch.equal(alone, fused[2 * m : 2 * m + 2])


# ---- expectations

NEAR = {"rtol": 0, "atol": 0.03}


def test_the_mean_over_masks_is_the_input():
    torch.testing.assert_close(locked_dropout(torch.ones(40_000, 1, 1), 0.4, training=True).mean().item(), 1.0, **NEAR)
    (dropped,) = weight_dropout(torch.ones(200, 200), 0.5, "shared", training=True)
    torch.testing.assert_close(dropped.mean().item(), 1.0, **NEAR)
    words = torch.arange(40_000).unsqueeze(0)
    dropped = embedding_dropout(torch.ones(1, 40_000, 1), words, 40_000, 0.1, "shared", training=True)
    torch.testing.assert_close(dropped.mean().item(), 1.0, **NEAR)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_masks_keep_the_probability(dtype):
    masks = dropout_masks(torch.empty(300, 300, dtype=dtype), 0.1, "shared")
    assert masks.dtype == dtype
    assert (masks == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)


def test_zoneout_keeps_units_in_training_and_gives_their_expectation_at_evaluation():
    previous, proposed = torch.full((100, 400), -1.0), torch.full((100, 400), 3.0)
    drawn = zoneout(previous, proposed, 0.15, training=True)
    torch.testing.assert_close(drawn, torch.where(drawn < 0, previous, proposed))
    assert (drawn < 0).float().mean().item() == pytest.approx(0.15, abs=0.01)
    expected = zoneout(previous, proposed, 0.15, training=False)
    torch.testing.assert_close(expected, 0.15 * previous + 0.85 * proposed)
    assert drawn.mean().item() == pytest.approx(expected[0, 0].item(), abs=0.05)


def test_zoneout_of_zero_and_one_is_the_new_and_the_old_state():
    previous, proposed = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(zoneout(previous, proposed, 0.0, training=True), proposed)
    torch.testing.assert_close(zoneout(previous, proposed, 1.0, training=True), previous)


# ---- weight dropout


@pytest.fixture
def masks_drawn(monkeypatch):
    """The masks over recurrent weights, in order, without the units that only pad them."""
    drawn = []

    def spy(like, p, mask_scope):
        masks = dropout_masks(like, p, mask_scope)
        units = masks.shape[-1]
        drawn.extend(masks.view(-1, 4, units, units)[:, :, :WIDTH, :WIDTH].reshape(-1, 4 * WIDTH, WIDTH))
        return masks

    monkeypatch.setattr(seqba.modules.weight_dropout, "dropout_masks", spy)
    return drawn


def as_made(one):
    return one


def moved(one):
    return one.to(torch.float64).to("cpu")


def reloaded(one):
    other = layer().double()
    other(torch.randn(2, 4, INPUT, dtype=torch.float64))  # it has run before it is loaded
    other.load_state_dict(one.state_dict())
    return other


def through_modes(one):
    x = torch.randn(2, 4, INPUT, dtype=one.weight_hh_l0.dtype)
    for train in (True, False, True, True, False):
        one.train(train)(x)[0].sum().backward()
    one.zero_grad()
    return one


def copied(one):
    one(torch.randn(2, 4, INPUT, dtype=one.weight_hh_l0.dtype))
    return copy.deepcopy(one)


def assigned(one):
    one.load_state_dict({name: x.clone() for name, x in one.state_dict().items()}, assign=True)
    return one


@pytest.mark.trap(33)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("handled", [as_made, moved, reloaded, through_modes, copied, assigned])
@pytest.mark.parametrize("num_copies", [1, 3])
def test_dropped_weights_reach_the_kernel_and_gradients_the_raw_ones(training, handled, num_copies, masks_drawn):
    one = handled(layer().double()).train(training)
    masks_drawn.clear()
    x = torch.randn(2 * num_copies, 4, INPUT, dtype=torch.float64, requires_grad=True)
    h, c = torch.randn(2, 1, 2 * num_copies, WIDTH, dtype=torch.float64)
    with copies_of_pass(range(num_copies)):
        output, (h_after, c_after) = one(x, (h, c))
    got = [output, h_after[0], c_after[0]]
    masks = masks_drawn if training else [torch.ones(())] * num_copies
    assert len(masks) == num_copies
    w_ih, w_hh, b_ih, b_hh = (getattr(one, name) for name in NAMES)
    rows = zip(x.chunk(num_copies), h[0].chunk(num_copies), c[0].chunk(num_copies), masks, strict=True)
    runs = [lstm_twin.lstm(x_m, h_m, c_m, w_ih, w_hh * mask, b_ih, b_hh) for x_m, h_m, c_m, mask in rows]
    want = [torch.cat(parts) for parts in zip(*runs, strict=True)]
    torch.testing.assert_close(got, want)
    leaves = [*one.parameters(), x]
    probes = [torch.randn_like(part) for part in want]
    got_gradients = torch.autograd.grad(got, leaves, probes)
    torch.testing.assert_close(got_gradients, torch.autograd.grad(want, leaves, probes))
    assert all(bool(gradient.any()) for gradient in got_gradients)


@pytest.mark.parametrize("size", [5, 16, 33])
def test_float32_kernels_agree_with_the_equations(size):
    one = WeightDropoutLSTM(size, size, 0.5)
    x = torch.randn(6, 4, size)
    with copies_of_pass((0, 1, 2)):
        torch.manual_seed(3)
        got, _ = one(x)
        torch.manual_seed(3)
        padded = -(-size // 16) * 16
        masks = dropout_masks(torch.empty(4 * padded, padded), 0.5, "per_copy").view(3, 4, padded, padded)
    zeros = torch.zeros(2, size)
    w_ih, w_hh, b_ih, b_hh = (getattr(one, name) for name in NAMES)
    for m, x_m in enumerate(x.chunk(3)):
        mask = masks[m, :, :size, :size].reshape(4 * size, size)
        want, _, _ = lstm_twin.lstm(x_m, zeros, zeros, w_ih, w_hh * mask, b_ih, b_hh)
        torch.testing.assert_close(got[2 * m : 2 * m + 2], want)


@pytest.mark.trap(33)
def test_parameters_are_those_of_torchs_lstm_before_and_after_every_mode():
    one, torchs = layer(), nn.LSTM(INPUT, WIDTH, batch_first=True)
    assert list(one.state_dict()) == list(torchs.state_dict()) == NAMES
    torchs.load_state_dict(one.state_dict())
    x = torch.randn(2, 4, INPUT)
    for train in (True, False, True, False):
        one.train(train)(x)[0].sum().backward()
        assert list(one.state_dict()) == [name for name, _ in one.named_parameters()] == NAMES
        assert not list(one.buffers())
    want, (h, c) = torchs(x)
    torch.testing.assert_close(one(x), (want, (h, c)))
    one.load_state_dict(torchs.state_dict())


@pytest.mark.trap(37)
@pytest.mark.parametrize("mask_scope", ["shared", "per_copy"])
def test_a_step_of_learning_rate_0_leaves_every_weight_as_it_was(mask_scope):
    one = layer(mask_scope=mask_scope)
    before = {name: x.clone() for name, x in one.state_dict().items()}
    for copies in ((0, 1, 2), (0,), (1, 2)):
        with copies_of_pass(copies):
            one(torch.randn(6, 4, INPUT))[0].sum().backward()
    torch.optim.SGD(one.parameters(), lr=0.0).step()
    for name, x in one.state_dict().items():
        assert torch.equal(x, before[name]), name


@pytest.mark.trap(1)
def test_copies_of_a_fused_pass_differ_under_per_copy_and_agree_under_shared_weight_masks():
    x = torch.randn(2, 4, INPUT).repeat(3, 1, 1)
    for mask_scope, number in (("shared", 1), ("per_copy", 3)):
        with copies_of_pass((0, 1, 2)):
            output, _ = layer(mask_scope=mask_scope)(x)
        assert len(output.detach().reshape(3, -1).unique(dim=0)) == number


def test_outside_a_pass_and_in_evaluation_there_is_one_mask_or_none():
    one = layer()
    x = torch.randn(2, 4, INPUT).repeat(2, 1, 1)
    first, second = one(x)[0].chunk(2)
    torch.testing.assert_close(first, second)
    assert not torch.equal(one(x)[0], one(x)[0])


# ---- embedding dropout


def test_embedding_dropout_is_a_lookup_in_a_matrix_of_dropped_rows():
    embedding, ids = nn.Embedding(11, 4), torch.randint(11, (6, 7))
    with copies_of_pass((0, 1, 2)):
        torch.manual_seed(5)
        got = embedding_dropout(embedding(ids), ids, 11, 0.5, "per_copy", training=True)
        torch.manual_seed(5)
        masks = dropout_masks(torch.empty(11), 0.5, "per_copy")
    want = torch.cat(
        [nn.functional.embedding(ids[2 * m : 2 * m + 2], embedding.weight * masks[m, :, None]) for m in range(3)]
    )
    torch.testing.assert_close(got, want)
    probe = torch.randn_like(got)
    torch.testing.assert_close(*(torch.autograd.grad(x, embedding.weight, probe)[0] for x in (got, want)))


@pytest.mark.trap(2)
def test_copies_of_a_fused_pass_differ_under_per_copy_and_agree_under_shared_word_masks():
    ids = torch.arange(50).repeat(3, 1)
    for mask_scope, number in (("shared", 1), ("per_copy", 3)):
        with copies_of_pass((0, 1, 2)):
            dropped = EmbeddingDropout(0.5, mask_scope)(torch.ones(3, 50, 2), ids, 50)
        assert len(dropped.unique(dim=0)) == number


# ---- streams


@pytest.mark.parametrize("mask_scope", ["shared", "per_copy"])
def test_under_streams_a_copy_meets_the_same_masks_whoever_stands_in_its_pass(mask_scope):
    one, words = layer(mask_scope=mask_scope), EmbeddingDropout(0.5, mask_scope)
    x, ids = torch.randn(2, 4, INPUT), torch.randint(9, (2, 4))

    def run(copies):
        with copy_streams(copies, seed=1, update=1, num_samples=2):
            rows = len(copies)
            return one(words(x.repeat(rows, 1, 1), ids.repeat(rows, 1), 9))[0].detach()

    fused = run((0, 1, 2))
    torch.testing.assert_close(torch.cat([run((0,)), run((1, 2))]), fused)
    assert torch.allclose(fused[:2], fused[2:4]) == (mask_scope == "shared")


# ---- evaluation and errors


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_evaluation_and_p_0_draw_nothing(p):
    ids, x, one = torch.randint(9, (4, 3)), torch.randn(4, 3, INPUT), layer(p)
    before = torch.get_rng_state()
    for training in (False, True) if p == 0 else (False,):
        with copies_of_pass((0, 1)):
            assert torch.equal(LockedDropout(p).train(training)(x), x)
            assert torch.equal(EmbeddingDropout(p).train(training)(x, ids, 9), x)
            assert torch.equal(one.train(training)(x)[0], one(x)[0])
            torch.testing.assert_close(Zoneout(p).train(training)(x[:, 0], x[:, 1]), p * x[:, 0] + (1 - p) * x[:, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_wrong_arguments_name_the_value_and_the_limit():
    for p in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"in \[0, 1\), got {p}"):
            layer(p)
        with pytest.raises(ValueError, match=rf"in \[0, 1\), got {p}"):
            EmbeddingDropout(p)
    with pytest.raises(ValueError, match="shared, per_copy, got 'each'"):
        layer(mask_scope="each")
    with copies_of_pass((0, 1)), pytest.raises(ValueError, match="3 is no positive multiple"):
        layer()(torch.randn(3, 4, INPUT))
    with copies_of_pass((0, 1)), pytest.raises(ValueError, match="3 is no positive multiple"):
        EmbeddingDropout(0.5)(torch.randn(3, 4, 2), torch.zeros(3, 4, dtype=torch.int64), 9)


# ---- AR and TAR


def test_ar_and_tar_divided_by_the_targets_are_means_over_elements():
    h = torch.randn(3, 4, 5)
    torch.testing.assert_close(activation_regularisation(h, 12) / 12, (h**2).mean())
    steps = torch.stack([(h[:, t + 1] - h[:, t]) ** 2 for t in range(3)])
    torch.testing.assert_close(temporal_activation_regularisation(h, torch.tensor(12)) / 12, steps.mean())


def test_ar_and_tar_of_passes_add_up_to_those_of_one_pass_over_all_rows():
    h = torch.randn(6, 4, 5)
    for penalty in (activation_regularisation, temporal_activation_regularisation):
        torch.testing.assert_close(penalty(h[:2], 8) + penalty(h[2:], 16), penalty(h, 24))


def test_ar_and_tar_are_finite_for_one_time_step_and_in_half_precision():
    one_step = torch.randn(3, 1, 5, requires_grad=True)
    assert temporal_activation_regularisation(one_step, 3) == 0
    large = torch.full((3, 4, 5), 300.0, dtype=torch.float16)
    assert activation_regularisation(large, 1) == 90_000


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_cudnn_finds_the_weights_in_one_chunk(training, recwarn):
    one = layer().cuda().train(training)
    with copies_of_pass((0, 1)):
        one(torch.randn(4, 3, INPUT, device="cuda"))[0].sum().backward()
    assert not recwarn.list
    assert all(bool(x.grad.any()) for x in one.parameters())
