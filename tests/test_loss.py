import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import seqba.loss
from seqba.loss import IGNORE_INDEX, count_targets, linear_cross_entropy, token_cross_entropy

# Enough tokens for three slices of the lean path, the last one short.
N, D, V = 611, 5, 37
EPS = [0.0, 0.1, 0.7]


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toy logits are large enough for the lean way."""
    monkeypatch.setattr(seqba.loss, "_MIN_LOGITS", 0)


@pytest.fixture(params=["plain", "sliced"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, small_is_large: None) -> str:
    """Each of the two ways of `linear_cross_entropy` in turn, on the same inputs."""
    if request.param == "plain":
        monkeypatch.setattr(seqba.loss, "_MIN_LOGITS", 2**40)
    return request.param


@pytest.fixture
def ways_taken(monkeypatch: pytest.MonkeyPatch, small_is_large: None) -> list[str]:
    """ "sliced" for each time that the lean way was taken in the test; empty where the plain one was."""
    taken: list[str] = []
    original = seqba.loss.SlicedLoss.apply

    def spy(*args: object) -> Tensor:
        taken.append("sliced")
        return original(*args)

    monkeypatch.setattr(seqba.loss.SlicedLoss, "apply", spy)
    return taken


def inputs(n: int = N, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(5)
    x = {
        "hidden": torch.randn(n, D, generator=rng, dtype=torch.float64),
        "weight": torch.randn(V, D, generator=rng, dtype=torch.float64),
        "bias": torch.randn(V, generator=rng, dtype=torch.float64),
    }
    x = {name: t.to(dtype).requires_grad_() for name, t in x.items()}
    x["labels"] = torch.randint(V, (n,), generator=rng)
    x["labels"][::7] = IGNORE_INDEX
    return x


def smoothed_nll(logits: Tensor, labels: Tensor, eps: float) -> Tensor:
    """The definition, written out: -sum_v q_v log p_v with q = (1 - eps) onehot + eps / V, over kept rows."""
    logits, labels = logits[labels != IGNORE_INDEX].double(), labels[labels != IGNORE_INDEX]
    log_p = logits - logits.exp().sum(-1, keepdim=True).log()
    q = torch.full_like(log_p, eps / logits.shape[-1])
    q[torch.arange(len(labels)), labels] += 1 - eps
    return -(q * log_p).sum()


def with_gradients(loss: Tensor, **parameters: Tensor) -> dict[str, Tensor]:
    """The loss and its gradient by name, with an incoming gradient that is not 1."""
    gradients = torch.autograd.grad(loss / 3, list(parameters.values()))
    return {"loss": loss.detach(), **dict(zip(parameters, gradients, strict=True))}


def twin(x: dict[str, Tensor], eps: float, *names: str) -> dict[str, Tensor]:
    """Loss and gradients of the definition in float64, of the same values as x."""
    x64 = {name: t if name == "labels" else t.detach().double().requires_grad_() for name, t in x.items()}
    logits = x64["hidden"] @ x64["weight"].T + x64.get("bias", 0)
    loss = smoothed_nll(logits, x64["labels"], eps)
    return with_gradients(loss, **{name: x64[name] for name in names})


# token_cross_entropy: the plain loss of logits


@pytest.mark.parametrize("eps", EPS)
def test_the_plain_loss_is_the_written_definition_and_torchs(eps):
    x = inputs()
    logits = (x["hidden"] @ x["weight"].T).detach().requires_grad_()
    got = with_gradients(token_cross_entropy(logits, x["labels"], label_smoothing=eps), logits=logits)
    want = with_gradients(smoothed_nll(logits, x["labels"], eps), logits=logits)
    torch.testing.assert_close(got, want)
    theirs = F.cross_entropy(logits, x["labels"], reduction="sum", label_smoothing=eps)
    torch.testing.assert_close(got["loss"], theirs.detach())


def test_leading_dimensions_of_logits_and_labels_do_not_matter():
    logits, labels = torch.randn(2, 3, 4, 7), torch.randint(7, (2, 3, 4))
    want = token_cross_entropy(logits.view(24, 7), labels.view(24), label_smoothing=0.1)
    torch.testing.assert_close(token_cross_entropy(logits, labels, label_smoothing=0.1), want)
    torch.testing.assert_close(
        token_cross_entropy(logits[0, 0, 0], labels[0, 0, 0]), F.cross_entropy(logits[0, 0, 0], labels[0, 0, 0])
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    logits = torch.zeros(3_000, 1_000, dtype=dtype)  # 20 723 nats: bfloat16 knows multiples of 128 there
    loss = token_cross_entropy(logits, torch.zeros(3_000, dtype=torch.int64), label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(3_000 * math.log(1_000), rel=1e-6)


def test_targets_are_counted_without_the_ignored_ones():
    count = count_targets(torch.tensor([[1, 0, IGNORE_INDEX], [2, IGNORE_INDEX, IGNORE_INDEX]]))
    assert count.dtype == torch.int64
    assert count.shape == ()
    assert count == 3
    assert count_targets(torch.zeros(0, 4, dtype=torch.int64)) == 0


# trap 31: the mass of the smoothed label is 1


@pytest.mark.trap(31)
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3, 0.99])
def test_uniform_logits_cost_log_v_a_token_whatever_the_smoothing(eps):
    labels = inputs()["labels"]
    loss = token_cross_entropy(torch.full((N, V), 4.2).double(), labels, label_smoothing=eps)
    assert loss.item() == pytest.approx(count_targets(labels).item() * math.log(V), rel=1e-12)


@pytest.mark.trap(31)
@pytest.mark.parametrize("eps", [0.0, 0.1, 0.3, 0.99])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_layer_of_equal_rows_costs_log_v_a_token_whatever_the_smoothing(way, ways_taken, eps, with_bias):
    x = inputs()
    weight = x["weight"][:1].expand(V, D)  # every class has the same logit, another one at each position
    bias = torch.full((V,), 0.7).double() if with_bias else None
    loss = linear_cross_entropy(x["hidden"], weight, x["labels"], bias=bias, label_smoothing=eps)
    assert loss.item() == pytest.approx(count_targets(x["labels"]).item() * math.log(V), rel=1e-12)
    assert ways_taken == [way] * (way != "plain")


@pytest.mark.trap(31)
def test_the_gradient_to_every_row_of_logits_sums_to_zero(way):
    x = inputs()
    loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"], label_smoothing=0.3)
    (grad,) = torch.autograd.grad(loss, x["bias"])  # sum_i (p_i - q_i), both of mass 1
    assert grad.sum().abs() < 1e-11


# linear_cross_entropy: exact, whichever way it goes


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("bias", [None, (V,), (1, V)])
def test_loss_and_gradients_are_those_of_the_float64_definition(way, ways_taken, eps, bias):
    x = inputs()
    if bias is None:
        del x["bias"]
    names = [name for name in x if name != "labels"]
    b = x["bias"].reshape(bias) if bias else None
    loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=b, label_smoothing=eps)
    got = with_gradients(loss, **{name: x[name] for name in names})
    torch.testing.assert_close(got, twin(x, eps, *names))
    assert loss.dtype == torch.float64
    assert loss.shape == ()
    assert ways_taken == [way] * (way != "plain")


@pytest.mark.parametrize("eps", EPS)
def test_float32_is_as_near_to_the_definition_as_the_plain_loss(way, eps):
    x = inputs(dtype=torch.float32)
    loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"], label_smoothing=eps)
    got = with_gradients(loss, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        {name: t.double() for name, t in got.items()},
        twin(x, eps, "hidden", "weight", "bias"),
        rtol=2e-6,
        atol=1e-5,
    )


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_a_weight_tied_to_the_embedding_gets_both_gradients(way, eps):
    x = inputs()
    ids = torch.arange(N) % V

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        hidden = torch.tanh(F.embedding(ids, x["weight"]) * x["hidden"].detach())
        return torch.autograd.grad(loss(hidden), x["weight"])[0]

    got = gradient(lambda h: linear_cross_entropy(h, x["weight"], x["labels"], label_smoothing=eps))
    want = gradient(lambda h: smoothed_nll(h @ x["weight"].T, x["labels"], eps))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_frozen_inputs_leave_the_gradients_of_the_others_unchanged(way, ways_taken, trained):
    x = inputs()
    want = twin(x, 0.1, *trained)
    for name in {"hidden", "weight", "bias"} - set(trained):
        x[name].requires_grad_(False)
    loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"], label_smoothing=0.1)
    torch.testing.assert_close(with_gradients(loss, **{name: x[name] for name in trained}), want)
    assert ways_taken == [way] * (way != "plain")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_gives_the_loss_of_training_and_no_graph(way, mode):
    x = inputs()
    with mode():
        loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"], label_smoothing=0.1)
    assert not loss.requires_grad
    torch.testing.assert_close(loss.clone(), twin(x, 0.1, "bias")["loss"])


def test_layout_and_leading_dimensions_of_the_inputs_do_not_matter(way):
    x = inputs(612)
    want = twin(x, 0.1, "hidden", "weight")
    hidden = x["hidden"].detach().view(4, 153, D).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    weight = x["weight"].detach().t().contiguous().t().requires_grad_()
    bias = torch.stack([x["bias"].detach()] * 2, dim=-1)[:, 0]
    labels = x["labels"].view(4, 153).t().contiguous().t()
    assert not any(t.is_contiguous() for t in (hidden, weight, bias, labels))
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.1)
    got = with_gradients(loss, hidden=hidden, weight=weight)
    got["hidden"] = got["hidden"].reshape(612, D)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (4, 0)])
def test_one_position_and_none_are_fine(way, shape):
    hidden, weight = torch.randn(*shape, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    labels = torch.randint(V, shape)
    loss = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1)
    want = F.cross_entropy((hidden @ weight.T).view(-1, V), labels.view(-1), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(
        with_gradients(loss, hidden=hidden, weight=weight), with_gradients(want, hidden=hidden, weight=weight)
    )


def test_only_ignored_labels_cost_nothing_and_move_nothing(way):
    x = inputs()
    labels = torch.full((N,), IGNORE_INDEX)
    loss = linear_cross_entropy(x["hidden"], x["weight"], labels, bias=x["bias"], label_smoothing=0.1)
    got = with_gradients(loss, hidden=x["hidden"], weight=x["weight"], bias=x["bias"])
    assert all(bool((t == 0).all()) for t in got.values())
    logits = torch.randn(4, V, requires_grad=True)
    got = with_gradients(token_cross_entropy(logits, labels[:4], label_smoothing=0.1), logits=logits)
    assert all(bool((t == 0).all()) for t in got.values())


@pytest.mark.parametrize("drop", [True, False])
def test_what_stands_at_an_ignored_position_has_no_influence(way, drop, monkeypatch):
    if not drop:  # as on a device, where dropping rows would wait for it
        monkeypatch.setattr(seqba.loss, "_can_drop_rows", lambda x: False)
    x = inputs()
    want = twin(x, 0.1, "weight", "bias")
    with torch.no_grad():
        x["hidden"][x["labels"] == IGNORE_INDEX] = math.nan
    loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"], label_smoothing=0.1)
    got = with_gradients(loss, weight=x["weight"], bias=x["bias"])
    torch.testing.assert_close(got, want)


# half precision: never less accurate than the plain loss


def relative_errors(got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((got[name].double() - t).norm() / t.norm()).item() for name, t in want.items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "half weights"])
def test_half_precision_is_as_near_to_the_definition_as_the_plain_loss(ways_taken, dtype, how):
    rng = torch.Generator().manual_seed(7)
    n, d, v = 2_051, 48, 401
    weight = torch.randn(v, d, generator=rng) * d**-0.5
    labels = torch.randint(v, (n,), generator=rng)
    labels[::5] = IGNORE_INDEX
    hidden = torch.randn(n, d, generator=rng) + 3 * weight[labels.clamp(min=0)]  # half learnt
    stored = torch.float32 if how == "autocast" else dtype
    x = {"hidden": hidden.to(stored).requires_grad_(), "weight": weight.to(stored).requires_grad_()}
    want = twin({**x, "labels": labels}, 0.1, "hidden", "weight")

    def errors(loss: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        with torch.autocast("cpu", dtype, enabled=how == "autocast"):
            nll = loss(x["hidden"], x["weight"])
        assert nll.dtype == torch.float32
        return relative_errors(with_gradients(nll, **x), want)

    plain = errors(lambda h, w: token_cross_entropy(F.linear(h, w), labels, label_smoothing=0.1))
    assert ways_taken == []
    lean = errors(lambda h, w: linear_cross_entropy(h, w, labels, label_smoothing=0.1))
    assert ways_taken == ["sliced"]
    assert lean["loss"] < 1e-4
    for name in ("hidden", "weight"):
        # A 16-bit weight's gradient, already a sum of 16-bit products in either way, is rounded once more.
        assert lean[name] < (1.05 if how == "autocast" else 1.25) * plain[name], name


def test_autocast_leaves_float64_to_the_exact_way(ways_taken):
    x = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], label_smoothing=0.1)
    del x["bias"]
    torch.testing.assert_close(with_gradients(loss, weight=x["weight"]), twin(x, 0.1, "weight"))
    assert ways_taken == ["sliced"]


@pytest.mark.gpu
@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_on_a_gpu_the_lean_loss_is_as_near_to_the_definition_as_the_plain_loss(small_is_large, dtype, eps):
    x = {name: t.detach().cuda() for name, t in inputs(5_003, torch.float32).items()}
    names = ["hidden", "weight", "bias"]
    for name in names:
        x[name].requires_grad_()
    want = twin(x, eps, *names)

    def errors(loss: Callable[[], Tensor]) -> dict[str, float]:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            nll = loss()
        return relative_errors(with_gradients(nll, **{name: x[name] for name in names}), want)

    plain = errors(
        lambda: token_cross_entropy(F.linear(x["hidden"], x["weight"], x["bias"]), x["labels"], label_smoothing=eps)
    )
    lean = errors(
        lambda: linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"], label_smoothing=eps)
    )
    slack = 1.1 if dtype is None else 1.25  # half precision rounds the logits of a slice elsewhere: 1.15 was measured
    for name in want:
        assert lean[name] < slack * plain[name] + 1e-5, name


# memory


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest tensor made by any operation inside `run`, as torch's allocator saw it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as trace:
        run()
    return max(event.self_cpu_memory_usage for event in trace.events())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
def test_the_lean_way_makes_no_tensor_near_the_size_of_the_logits(way, ways_taken, precision, trained):
    n, d, v = 5_120, 3, 701
    hidden, weight = torch.randn(n, d, requires_grad=trained), torch.randn(v, d, requires_grad=trained)
    bias, labels = torch.randn(v, requires_grad=trained), torch.randint(v, (n,))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            loss = linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.1)
        if trained:
            loss.backward()

    largest = largest_allocation(run)
    assert bool(ways_taken) == (way != "plain")
    if ways_taken:
        assert largest <= n * v * 4 / 16
    else:
        assert largest >= n * v * 4


# which way


@pytest.mark.parametrize(("n", "d", "v"), [(511, 3, 400), (900, 7, 7), (900, 8, 7)])
def test_few_tokens_and_few_classes_take_the_plain_way(ways_taken, n, d, v):
    linear_cross_entropy(torch.randn(n, d), torch.randn(v, d), torch.randint(v, (n,)))
    assert ways_taken == []


@pytest.mark.parametrize(("n", "lean"), [(512, False), (513, True)])
def test_logits_of_64_megabytes_take_a_lean_way(monkeypatch, n, lean):
    taken: list[int] = []
    monkeypatch.setattr(seqba.loss.SlicedLoss, "apply", lambda *args: taken.append(1))
    v = 2**24 // 513 + 1
    linear_cross_entropy(torch.zeros(n, 2), torch.zeros(v, 2), torch.zeros(n, dtype=torch.int64))
    assert bool(taken) == lean


def test_per_sample_gradients_are_those_of_a_loop(ways_taken):
    b, t = 4, 607
    x = inputs(b * t)
    hidden, labels = x["hidden"].detach().view(b, t, D), x["labels"].view(b, t)
    weight, bias = x["weight"].detach(), x["bias"].detach()

    def loss(weight: Tensor, bias: Tensor, hidden: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, bias=bias, label_smoothing=0.1)

    per_sample = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)), in_dims=(None, None, 0, 0))
    got = per_sample(weight, bias, hidden, labels)
    assert ways_taken == []
    for i in range(b):
        want = torch.autograd.grad(loss(x["weight"], x["bias"], hidden[i], labels[i]), (x["weight"], x["bias"]))
        torch.testing.assert_close((got[0][i], got[1][i]), want)
    assert ways_taken == ["sliced"] * b


@pytest.mark.parametrize("rows", [3, 8])
def test_the_gradient_is_that_of_finite_differences_and_only_the_plain_way_has_a_second_one(
    ways_taken, monkeypatch, rows
):
    monkeypatch.setattr(seqba.loss, "_MIN_ROWS", rows)
    x = inputs(9)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, x["labels"], bias=bias, label_smoothing=0.1)

    arguments = (x["hidden"], x["weight"], x["bias"])
    torch.autograd.gradcheck(loss, arguments, fast_mode=True)
    if rows == 8:
        torch.autograd.gradgradcheck(loss, arguments, fast_mode=True)
        assert ways_taken == []
        return
    assert ways_taken
    with pytest.raises(RuntimeError, match="use token_cross_entropy on the logits"):
        torch.autograd.grad(loss(*arguments), x["hidden"], create_graph=True)


def test_a_second_backward_through_a_kept_graph_gives_the_same_again(way):
    x = inputs()
    loss = linear_cross_entropy(x["hidden"], x["weight"], x["labels"], bias=x["bias"], label_smoothing=0.1)
    names = ("hidden", "weight", "bias")
    first = torch.autograd.grad(loss, [x[name] for name in names], retain_graph=True)
    again = torch.autograd.grad(2 * loss, [x[name] for name in names])
    torch.testing.assert_close(again, tuple(2 * grad for grad in first))


# errors


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"label_smoothing": math.nan}, ValueError, r"label_smoothing must be in \[0, 1\), got nan"),
        ({"labels": torch.zeros(N - 1, dtype=torch.int64)}, ValueError, r"labels must be \(611,\).*\(610,\)"),
        ({"labels": torch.zeros(N, dtype=torch.int32)}, ValueError, "labels must be int64, got torch.int32"),
        ({"labels": torch.zeros(N)}, ValueError, "labels must be int64, got torch.float32"),
        ({"labels": torch.full((N,), V)}, IndexError, "label 37 is outside the vocabulary of 37"),
        ({"labels": torch.full((N,), -1)}, IndexError, "label -1 is outside the vocabulary of 37"),
        ({"weight": torch.zeros(V, D + 1)}, ValueError, r"hidden \(611, 5\) and weight \(37, 6\) must be"),
        ({"weight": torch.zeros(V)}, ValueError, r"hidden \(611, 5\) and weight \(37,\) must be"),
        ({"bias": torch.zeros(V, 1).double()}, ValueError, r"bias must be \(37,\) or \(1, 37\), got \(37, 1\)"),
        ({"bias": torch.zeros(1).double()}, ValueError, r"bias must be \(37,\) or \(1, 37\), got \(1,\)"),
        ({"weight": torch.zeros(V, D)}, ValueError, "one dtype outside autocast, got torch.float32, torch.float64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_by_name(way, change, error, match):
    arguments = {**inputs(), **change}
    with pytest.raises(error, match=match):
        linear_cross_entropy(**arguments)


def test_labels_outside_the_logits_are_refused_by_name():
    with pytest.raises(IndexError, match="label 7 is outside the vocabulary of 7"):
        token_cross_entropy(torch.zeros(2, 7), torch.tensor([3, 7]))
    with pytest.raises(ValueError, match=r"labels must be \(2,\)"):
        token_cross_entropy(torch.zeros(2, 7), torch.zeros(2, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="label_smoothing"):
        token_cross_entropy(torch.zeros(2, 7), torch.tensor([3, 6]), label_smoothing=1.5)
