"""The audit's laws: what it finds, what its shares mean, what it leaves untouched, what training does with it."""

import json
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from seqba.audit import IdenticalCopiesError, audit_masks, check_copies_differ
from seqba.audit.masks import NO_EFFECT
from seqba.audit.report import INACTIVE, PER_COPY, SHARED
from seqba.context import current_copies

B, D = 3, 5


class Apply(nn.Module):
    """A user's module: a linear layer (B, 5) -> (B, 8), then any function."""

    def __init__(self, function):
        super().__init__()
        self.layer = nn.Linear(D, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.layer(x))


def x(num_samples=B):
    return torch.randn(num_samples, D)


def only(audit):
    """The one operation of an audit."""
    (operation,) = audit.operations
    return operation


def scopes(audit):
    return {(operation.path, operation.kind): operation.scope for operation in audit.operations}


# ---- per copy or shared, by evidence


@pytest.mark.parametrize("num_copies", [2, 4])
@pytest.mark.parametrize(
    ("draw", "kind", "probability"),
    [
        (lambda h: h * torch.bernoulli(torch.full_like(h, 0.7)), "bernoulli", 0.7),
        (lambda h: h * torch.empty_like(h).bernoulli_(0.7), "bernoulli", 0.7),
        (lambda h: h * torch.bernoulli(h.sigmoid()), "bernoulli", None),
        (lambda h: h * (torch.rand(len(h), 1) < 0.7), "uniform", None),
        (lambda h: h + torch.randn_like(h), "normal", None),
        (lambda h: F.dropout(h, 0.4), "dropout", 0.4),
        (lambda h: torch.dropout(h, 0.4, True), "dropout", 0.4),
        (lambda h: F.dropout1d(h[:, :, None], 0.4)[..., 0], "dropout", 0.4),
        (lambda h: F.alpha_dropout(h, 0.4, training=True), "dropout", 0.4),
        (lambda h: F.gumbel_softmax(h), "Gumbel softmax", None),
    ],
)
def test_a_draw_with_the_rows_of_the_copies_is_per_copy(draw, kind, probability, num_copies):
    operation = only(audit_masks(Apply(draw), x(), num_copies))
    assert (operation.scope, operation.kind) == (PER_COPY, kind)
    assert operation.variance_share == pytest.approx(1.0)  # nothing else is random
    assert operation.probability == (None if probability is None else (probability, probability))


@pytest.mark.parametrize(
    "draw",
    [
        lambda h: h * (torch.rand(1, 8) < 0.7),
        lambda h: h * torch.rand([]),
        lambda h: h * torch.bernoulli(torch.full((8,), 0.7)),
        lambda h: F.linear(h, F.dropout(torch.ones(8, 8), 0.4)),
        lambda h: h[:, torch.randperm(8)],
        lambda h: h * F.dropout(torch.ones(2 * B, 8), 0.4).mean(),  # as many rows as two copies have
        lambda h: h * F.dropout(torch.ones(B, 8), 0.4).mean(),  # as many rows as one copy has
    ],
)
@pytest.mark.parametrize("num_copies", [2, 3])
def test_a_draw_that_does_not_grow_with_the_copies_is_shared(draw, num_copies):
    audit = audit_masks(Apply(draw), x(), num_copies)
    assert only(audit).scope == SHARED
    assert only(audit).variance_share == 0
    assert audit.shared == audit.operations
    assert audit.any_random
    assert not audit.copies_differ


def test_a_mask_for_all_samples_of_a_copy_is_per_copy_and_one_for_all_copies_is_shared():
    def locked(h):
        mask = torch.bernoulli(torch.full((len(current_copies()), 1, 8), 0.5))
        return (h.unflatten(0, (len(mask), -1)) * mask).flatten(0, 1)

    assert only(audit_masks(Apply(locked), x())).scope == PER_COPY
    assert only(audit_masks(Apply(lambda h: h * torch.rand(1, 1)), x())).scope == SHARED


@pytest.mark.parametrize("rows", [2 * B, 7])
def test_two_dropouts_of_one_module_are_told_apart_although_their_shapes_coincide(rows):
    weight = torch.ones(rows, 8)

    def both(h):  # at two copies both draw (2B, 8)
        return F.dropout(h, 0.5) * F.dropout(weight, 0.5).mean()

    audit = audit_masks(Apply(both), x())
    assert [(operation.scope, operation.calls) for operation in audit.operations] == [(PER_COPY, 1), (SHARED, 1)]
    assert audit.operations[0].variance_share == pytest.approx(1.0)


def test_a_dropped_parameter_is_weight_dropout():
    class DropConnect(nn.Linear):
        def forward(self, x):
            return F.linear(x, F.dropout(self.weight, 0.5, self.training), self.bias)

    operation = only(audit_masks(DropConnect(D, 2), x()))
    assert (operation.kind, operation.scope, operation.probability) == ("weight dropout", SHARED, (0.5, 0.5))


@pytest.mark.parametrize(
    ("draw", "generator"),
    [
        (lambda: random.random(), "Python's random"),
        (lambda: np.random.rand(), "numpy.random"),
    ],
)
def test_draws_of_python_and_numpy_are_found_and_scoped(draw, generator):
    once = only(audit_masks(Apply(lambda h: h * draw()), x()))
    assert (once.kind, once.scope) == (generator, SHARED)
    audit = audit_masks(Apply(lambda h: h * torch.tensor([[draw()] for _ in h])), x())
    assert (only(audit).kind, only(audit).scope) == (generator, PER_COPY)
    assert only(audit).variance_share is None
    assert generator in audit.variance_note


def test_single_numbers_drawn_row_after_row_are_per_copy():
    audit = audit_masks(Apply(lambda h: h * torch.stack([torch.rand(()) for _ in h])[:, None]), x(), 3)
    assert (only(audit).scope, only(audit).calls) == (PER_COPY, 3 * B)
    assert "cannot be told apart by copy" in audit.variance_note


@pytest.mark.trap(3)
def test_a_shared_draw_stays_shared_beside_draws_of_its_kind_row_after_row():
    def both(h):
        return h * torch.rand(1, 8) * torch.stack([torch.rand(()) for _ in h])[:, None]

    audit = audit_masks(Apply(both), x(), 3)
    found = {(operation.kind, operation.scope): operation.calls for operation in audit.operations}
    assert found == {("uniform", PER_COPY): 3 * B, ("uniform", SHARED): 1}


@pytest.mark.trap(3)
@pytest.mark.parametrize("runs", [lambda number: number < 0.5, lambda number: number > 0.5], ids=["low", "high"])
def test_what_a_single_number_skips_is_met_whichever_side_skips_it(runs):
    def sometimes(h):
        return F.dropout(h, 0.5) if runs(torch.rand([])) else h

    audit = audit_masks(Apply(sometimes), x())
    assert scopes(audit) == {("", "dropout"): PER_COPY, ("", "uniform"): SHARED}


@pytest.mark.parametrize("draw", [random.random, lambda: float(np.random.rand())], ids=["python", "numpy"])
def test_shares_are_measured_under_equal_draws_of_python_and_numpy(draw):
    audit = audit_masks(Apply(lambda h: F.dropout(h, 0.5) * (0.1 + 100 * draw() ** 4)), x())
    dropped, scale = audit.operations
    assert (dropped.scope, scale.scope) == (PER_COPY, SHARED)
    assert dropped.variance_share == pytest.approx(1.0)  # of what differs between copies


def test_what_no_generator_shows_is_found_by_comparing_copies():
    hidden = np.random.default_rng(1)

    audit = audit_masks(Apply(lambda h: h * torch.from_numpy(hidden.random(h.shape, dtype=np.float32))), x())
    assert only(audit).kind == "randomness outside torch"
    assert audit.copies_differ


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_each_draw_once(reentrant):
    def checkpointed(h):
        return checkpoint(lambda y: F.dropout(y, 0.5), h, use_reentrant=reentrant)

    assert only(audit_masks(Apply(checkpointed), x())).calls == 1


def test_a_compiled_or_wrapped_model_is_audited_as_itself():
    model = Apply(nn.Dropout(0.3))
    want = audit_masks(model, x()).to_dict()
    assert audit_masks(torch.compile(model, backend="eager"), x()).to_dict() == want
    assert audit_masks(nn.DataParallel(model), x()).to_dict() == want
    model.compile(backend="aot_eager")
    assert audit_masks(model, x()).to_dict() == want


# ---- inactive


@pytest.mark.trap(34)
def test_dropout_that_is_off_is_inactive_with_the_reason():
    model = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.0), nn.Dropout(0.2), nn.Dropout(0.3), nn.Dropout(1.0))
    model.train()
    model[2].eval()
    found = {operation.path: (operation.scope, operation.reason) for operation in audit_masks(model, x()).operations}
    want = {"1": (INACTIVE, "p=0"), "2": (INACTIVE, "eval mode"), "3": (INACTIVE, NO_EFFECT), "4": (INACTIVE, "p=1")}
    assert found == want  # nothing passes the last one


class _NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        return h * 1.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.rand_like(gradient)


@pytest.mark.trap(34)
@pytest.mark.parametrize(
    "draw",
    [
        lambda h: h + 0 * torch.randn_like(h),
        lambda h: h * torch.empty_like(h).bernoulli_(1.0),
        lambda h: h + 0 * F.dropout(h, 0.5),
    ],
)
def test_draws_without_effect_are_no_transform(draw):
    audit = audit_masks(nn.Sequential(nn.Linear(D, D), Apply(draw)), x())
    assert {one.reason for one in audit.operations} == {NO_EFFECT}
    assert not audit.copies_differ
    with pytest.raises(IdenticalCopiesError, match="no effect on output or gradient"):
        check_copies_differ(audit)


def test_draws_of_the_backward_pass_alone_make_copies_differ():
    audit = audit_masks(nn.Sequential(nn.Linear(D, D), Apply(_NoisyGradient.apply)), x())
    assert audit.copies_differ
    assert all(p.grad is None for p in nn.Linear(D, D).parameters())


@pytest.mark.parametrize(
    "coin",
    [
        lambda: torch.rand(()) < 0.5,
        lambda: torch.rand(1) > 0.5,
        lambda: 0.4 < torch.rand(()) < 0.6,
        lambda: torch.randint(2, (1,)) == 1,
        lambda: torch.randint(2, (1,)) == 0,
        lambda: torch.bernoulli(torch.tensor(0.5)) == 1,
        lambda: torch.randn(()) > 1,
        lambda: random.random() < 0.5,
    ],
)
def test_a_dropout_behind_a_coin_is_met(coin):
    audit = audit_masks(nn.Sequential(nn.Linear(D, D), Apply(lambda h: F.dropout(h, 0.5) if bool(coin()) else h)), x())
    assert "dropout" in {one.kind for one in audit.operations if one.scope == PER_COPY}


@pytest.mark.filterwarnings("ignore:.torch.jit")  # a DeprecationWarning, later a FutureWarning
def test_a_scripted_part_of_a_model_is_audited_as_its_callers():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.3)))
    audit = audit_masks(nn.Sequential(nn.Linear(D, D), scripted), x())
    assert [(one.path, one.scope) for one in audit.operations] == [("", PER_COPY)]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
def test_draws_over_nested_tensors_are_seen():
    def nested(h):
        rows = F.dropout(torch.nested.nested_tensor(list(h)), 0.5)
        return torch.nested.to_padded_tensor(rows, 0.0)

    audit = audit_masks(Apply(nested), x())
    assert audit.copies_differ
    assert "cannot be told apart by copy" in audit.variance_note


@pytest.mark.trap(34)
def test_a_model_in_eval_mode_is_trained_for_the_audit_unless_it_refuses():
    class Frozen(nn.Dropout):
        def train(self, mode=True):
            return super().train(False)

    model = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), Frozen(0.5)).eval()
    assert scopes(audit_masks(model, x())) == {("1", "dropout"): PER_COPY, ("2", "dropout"): INACTIVE}
    assert not any(module.training for module in model.modules())


@pytest.mark.trap(34)
def test_copies_with_nothing_random_are_refused_with_the_table_and_the_reason():
    audit = audit_masks(nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.0)), x())
    assert not audit.any_random
    with pytest.raises(IdenticalCopiesError, match=r"inactive \(p=0\)(.|\n)*M times as much for nothing"):
        check_copies_differ(audit)
    check_copies_differ(audit_masks(nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.1)), x()))


@pytest.mark.trap(3)
def test_copies_with_shared_draws_alone_are_warned_about_by_name():
    audit = audit_masks(Apply(lambda h: h * torch.rand(1, 8)), x())
    with pytest.warns(UserWarning, match="uniform in the model itself"):
        check_copies_differ(audit)


# ---- what stays as it was


def test_modes_statistics_generators_and_gradients_are_left_as_they_were():
    own = torch.Generator().manual_seed(5)
    model = nn.Sequential(
        nn.Linear(D, 8),
        nn.BatchNorm1d(8),
        nn.Dropout(0.5),
        Apply(lambda h: h * torch.rand(h.shape, generator=own) * random.random() * np.random.rand()),
    )
    model[3].layer = nn.Identity()
    model.train()
    model[2].eval()
    batch = x(4)
    before = everything(model, own)
    audit_masks(model, batch)
    torch.testing.assert_close(everything(model, own), before, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="broken"):
        audit_masks(model, batch, forward=lambda model, batch: (model(batch), broken()))
    torch.testing.assert_close(everything(model, own), before, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def broken():
    raise RuntimeError("broken")


def everything(model, own):
    return {
        **{name: value.clone() for name, value in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
        "torch": torch.get_rng_state(),
        "own": own.get_state(),
        "python": random.getstate()[1],
        "numpy": np.random.get_state()[1].tolist(),
    }


def test_the_audit_says_the_same_twice():
    model = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.1))
    batch = x()
    first = audit_masks(model, batch).to_dict()
    torch.rand(7)
    assert audit_masks(model, batch).to_dict() == first


# ---- interface


def test_repeated_layers_are_one_row_with_a_count():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.1)) for _ in range(4)), nn.Dropout(0.2))
    first, last = audit_masks(model, x()).operations
    assert (first.path, first.calls) == ("{0-3}.1", 4)
    assert first.paths == ("0.1", "1.1", "2.1", "3.1")
    assert (last.path, last.calls) == ("4", 1)


def test_the_table_is_aligned_and_ends_with_the_verdict():
    model = nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.125), nn.Dropout(0.0), Apply(lambda h: h * torch.rand(1)))
    model[3].layer = nn.Identity()
    audit = audit_masks(model, x())
    lines = str(audit).splitlines()
    head = next(line for line in lines if line.startswith("module"))
    rows = [line for line in lines if line.startswith(("1", "2", "3"))]
    assert len(rows) == len(audit.operations) == 3
    for operation, row in zip(audit.operations, rows, strict=True):
        assert row[head.index("kind") :].startswith(operation.kind)
        assert row[head.index("draws") :].startswith(operation.scope)
        assert row[: head.index("calls") + len("calls")].endswith(str(operation.calls))
    assert lines[-1] == audit.verdict
    assert "uniform in 3" in audit.verdict


def test_the_dictionary_is_json_and_says_what_the_audit_says():
    audit = audit_masks(nn.Sequential(nn.Linear(D, 8), nn.Dropout(0.25)), x(), 3)
    loaded = json.loads(json.dumps(audit.to_dict()))
    assert (loaded["num_copies"], loaded["num_samples"], loaded["copies_differ"]) == (3, B, True)
    (operation,) = loaded["operations"]
    assert (operation["paths"], operation["probability"], operation["scope"]) == (["1"], [0.25, 0.25], PER_COPY)


def test_batches_go_to_the_model_by_keyword_by_position_or_as_asked():
    class Named(nn.Module):
        def forward(self, first, second):
            return F.dropout(first + second, 0.5)

    batch = {"first": x(), "second": x()}
    want = audit_masks(Named(), batch).to_dict()
    assert audit_masks(Named(), tuple(batch.values())).to_dict() == want
    assert audit_masks(Named(), batch, forward=lambda model, b: model(b["first"], b["second"])).to_dict() == want


def test_what_cannot_be_audited_is_refused():
    with pytest.raises(ValueError, match="at least 2"):
        audit_masks(nn.Dropout(0.5), x(), 1)
    with pytest.raises(ValueError, match="nothing to repeat"):
        audit_masks(nn.Dropout(0.5), {"scale": 2.0})
    with pytest.raises(TypeError, match="sparse"):
        audit_masks(nn.Dropout(0.5), {"input": x().to_sparse()})
