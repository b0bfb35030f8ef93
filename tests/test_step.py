import logging

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from distributed import run_ranks
from seqba import TrainStep, repeat_batch
from seqba.groups import CopyGroup
from seqba.passes import CopyPlan, PassLoop, plan_passes
from tiny_models import FAMILIES, batch_for, count, gradients, marian, summed_nll
from trainers import summary


class Kept(torch.optim.SGD):
    """An optimizer of learning rate 0 that remembers the gradients that it was given."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=0.0)
        self.names = [name for name, _ in model.named_parameters()]

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        self.seen = {n: p.grad.clone() for n, p in zip(self.names, parameters, strict=True) if p.grad is not None}
        return super().step(closure)


def step_gradient(model, batches, *, label_smoothing=0.0, accelerator=None, update=1, **options):
    """The gradient that a TrainStep hands to the optimizer, and its result."""
    optimizer = Kept(model)
    step = TrainStep(
        accelerator or Accelerator(cpu=True),
        model.train(),
        optimizer,
        loss_fn=lambda m, rows: summed_nll(m, rows, label_smoothing),
        count_fn=count,
        **options,
    )
    result = step(batches, update=update)
    assert all(p.grad is None for p in model.parameters())
    return optimizer.seen, result


def reference_gradient(model, batches, label_smoothing=0.0):
    """The gradient of the summed token loss over all batches, divided by their tokens; no step, no copies."""
    model.zero_grad()
    total = sum(summed_nll(model, batch, label_smoothing) for batch in batches)
    (total / sum(int(count(batch)) for batch in batches)).backward()
    want = gradients(model)
    model.zero_grad()
    return want


def assert_close(got, want):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.trap(8)
@pytest.mark.trap(10)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_without_dropout_every_m_and_plan_gives_the_gradient_of_the_mean_token_loss(
    family, label_smoothing, accumulation
):
    model = FAMILIES[family](dropout=0.0)
    batches = [batch_for(family, 3 + i, seed=i) for i in range(accumulation)]  # ragged, of unequal token counts
    want = reference_gradient(model, batches, label_smoothing)
    for num_copies, copies_per_pass in [(1, 1), (3, 1), (3, 2), (4, "auto")]:
        got, result = step_gradient(
            model, batches, label_smoothing=label_smoothing, num_copies=num_copies, copies_per_pass=copies_per_pass
        )
        assert_close(got, want)
        tokens = sum(int(count(batch)) for batch in batches)
        assert int(result.num_targets) == num_copies * tokens
        assert int(result.num_samples) == sum(len(batch["labels"]) for batch in batches)
        norm = torch.stack([g.norm() for g in want.values()]).norm()
        torch.testing.assert_close(result.grad_norm, norm, rtol=1e-4, atol=1e-6)


@pytest.mark.trap(12)
@pytest.mark.parametrize(("num_copies", "copies_per_pass"), [(10, 4), (10, 3), (5, 2), (7, 7)])
def test_passes_that_do_not_divide_m_leave_the_gradient_unchanged(num_copies, copies_per_pass):
    passes = plan_passes(range(num_copies), copies_per_pass)
    assert [copy for copies in passes for copy in copies] == list(range(num_copies))
    assert max(map(len, passes)) == copies_per_pass
    # the copies differ, so that a mean of the passes' means would weigh the copies of a short pass more
    model, batch = marian(dropout=0.3), batch_for("marian")
    options = {"num_copies": num_copies, "copy_seed": 1}
    want, fused = step_gradient(model, [batch], copies_per_pass=num_copies, **options)
    got, result = step_gradient(model, [batch], copies_per_pass=copies_per_pass, **options)
    assert_close(got, want)
    torch.testing.assert_close(result.loss, fused.loss)


@pytest.mark.trap(10)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_dropout_and_streams_all_plans_give_the_same_gradient(family):
    model = FAMILIES[family](dropout=0.3)
    batches = [batch_for(family, 3, seed=1), batch_for(family, 2, seed=2)]
    options = {"num_copies": 4, "copy_seed": 5, "update": 9}
    want, _ = step_gradient(model, batches, copies_per_pass=4, **options)
    for copies_per_pass in (1, 3):
        got, _ = step_gradient(model, batches, copies_per_pass=copies_per_pass, **options)
        assert_close(got, want)
    other, _ = step_gradient(model, batches, copies_per_pass=4, **{**options, "update": 10})
    assert any(not torch.allclose(other[name], want[name]) for name in want)


def test_the_same_samples_in_two_shards_of_an_update_meet_other_masks():
    model, batch = marian(dropout=0.4), batch_for("marian")
    once, _ = step_gradient(model, [batch], num_copies=1, copy_seed=1)
    twice, _ = step_gradient(model, [batch, batch], num_copies=1, copy_seed=1)
    assert any(not torch.allclose(once[name], twice[name], rtol=1e-3) for name in once)


@pytest.mark.trap(11)
@pytest.mark.parametrize("copies_per_pass", [1, 2, 4])
@pytest.mark.parametrize("max_norm", [None, 0.05])
def test_under_a_loss_scaler_the_scaled_and_clipped_gradient_is_that_of_fp32(copies_per_pass, max_norm, monkeypatch):
    model, batch = marian(dropout=0.0), batch_for("marian")
    want = reference_gradient(model, [batch])
    norm = float(torch.stack([g.norm() for g in want.values()]).norm())
    if max_norm is not None:
        assert norm > max_norm  # so that clipping does act
        want = {name: g * max_norm / norm for name, g in want.items()}
    # accelerate has fp16 on accelerators only; the scaler's arithmetic is the same here
    monkeypatch.setattr(Accelerator, "mixed_precision", property(lambda self: "fp16"))
    accelerator = Accelerator(cpu=True)
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = Kept(model)
    prepared = accelerator.prepare(optimizer)
    prepared.scaler = accelerator.scaler
    step = TrainStep(
        accelerator,
        model.train(),
        prepared,
        loss_fn=summed_nll,
        count_fn=count,
        num_copies=4,
        copies_per_pass=copies_per_pass,
        max_norm=max_norm,
    )
    result = step([batch], update=1)
    got = optimizer.seen
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-3, atol=1e-6)
    assert abs(float(result.grad_norm) - norm) < 1e-3 * norm


# ---- out of memory


class SmallMemory(nn.Module):
    """A model that runs out of memory when it is given more rows than fit, in forward or in backward."""

    def __init__(self, model, fits, where="forward"):
        super().__init__()
        self.model, self.fits, self.where = model, fits, where
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, **rows):
        self.passes += 1
        too_many = len(rows["input_ids"]) > self.fits
        if too_many and self.where == "forward":
            self.model(**rows)  # some masks are drawn first
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        output = self.model(**rows)
        if too_many:
            output.logits = _FailingBackward.apply(output.logits)
        return output


class _FailingBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("copy_seed", [None, 3])
@pytest.mark.parametrize(("fits", "settles"), [(2, 2), (1, 1)])
def test_auto_settles_on_a_smaller_pass_and_is_bitwise_as_if_it_had_begun_there(
    where, copy_seed, fits, settles, caplog
):
    network, batch = marian(dropout=0.3), batch_for("marian")
    samples = len(batch["labels"])
    options = {"num_copies": 5, "copy_seed": copy_seed}
    state = torch.get_rng_state()
    begun_there = SmallMemory(network, 100, where)
    want, _ = step_gradient(begun_there, [batch], copies_per_pass=settles, **options)
    after = torch.get_rng_state()

    torch.set_rng_state(state)
    model = SmallMemory(network, fits * samples, where)
    with caplog.at_level(logging.WARNING):
        got, result = step_gradient(model, [batch], copies_per_pass="auto", **options)
    assert result.copies_per_pass == settles
    for name in want:
        assert torch.equal(got[name], want[name]), name
    assert torch.equal(model.passes, begun_there.passes)  # buffers were put back before the update was done again
    assert torch.equal(torch.get_rng_state(), after)
    said = [record.getMessage() for record in caplog.records if "copies in a pass" in record.getMessage()]
    assert len(said) == (1 if settles == 2 else 2)
    assert f"with {settles}" in said[-1]


def test_two_halvings_beside_gradients_of_an_earlier_batch_begin_with_what_was_there():
    def gradient(copies_per_pass, fails=()):
        model, met = nn.Linear(3, 2, bias=False), []
        nn.init.ones_(model.weight)  # whole numbers: sums are exact in every order
        loop = PassLoop(Accelerator(cpu=True), CopyPlan(range(4), copies_per_pass), CopyGroup(4))

        def run_pass(one, batch):
            loss = sum((copy + 1) * model(batch).square().sum() for copy in one.copies)
            loss.backward()
            met.append(one.copies)
            if one.batch == 1 and one.copies in fails:  # late: its gradient has been added
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
            return loss.detach()

        for number in (0, 1):
            batch = torch.full((5, 3), 1.0 + number)
            loop.run(model, [batch], run_pass, lambda *a: None, update=1, first=number, of=2)
        return model.weight.grad, met

    want, _ = gradient(1)
    got, met = gradient("auto", [(0, 1, 2, 3), (2, 3)])
    assert met[1:] == [(0, 1, 2, 3), (0, 1), (2, 3), (0,), (1,), (2,), (3,)]  # K = 4, 2, 1
    assert torch.equal(got, want)


def test_auto_remembers_and_says_it_once(caplog):
    model, batch = SmallMemory(marian(), 2 * 3), batch_for("marian", 3)
    step = TrainStep(
        Accelerator(cpu=True),
        model,
        Kept(model),
        loss_fn=summed_nll,
        count_fn=count,
        num_copies=4,
        copies_per_pass="auto",
    )
    results = [step([batch], update=update) for update in (1, 2, 3)]
    assert [result.copies_per_pass for result in results] == [2, 2, 2]
    assert len(caplog.records) == 1


def test_one_copy_a_pass_that_does_not_fit_and_other_errors_are_raised_as_they_are():
    batch = batch_for("marian")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        step_gradient(SmallMemory(marian(), 1), [batch], num_copies=2, copies_per_pass="auto")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        step_gradient(SmallMemory(marian(), 3), [batch], num_copies=2, copies_per_pass=2)


OOM_RANKS = """
import torch
from accelerate import Accelerator
from torch import nn
from distributed import report
from seqba import TrainStep
from tiny_models import batch_for, count, marian, summed_nll
from test_step import Kept, SmallMemory

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
torch.manual_seed(0)
network = marian(dropout=0.0)
fits = 6 if rank == 1 else 100  # only rank 1 is short of memory: two copies of its three samples fit
model = SmallMemory(network, fits)
optimizer = Kept(model)
wrapped = accelerator.prepare(model)
step = TrainStep(accelerator, wrapped, optimizer, loss_fn=summed_nll, count_fn=count, num_copies=4)
results = [step([batch_for("marian", 3, seed=rank)], update=u) for u in (1, 2)]
same = summed_nll(network, batch_for("marian", 3, seed=rank))
report({
    "num_processes": accelerator.num_processes,
    "copies_per_pass": [r.copies_per_pass for r in results],
    "norm": float(results[0].grad_norm),
})
"""


def test_ranks_agree_on_the_copies_in_a_pass_when_one_of_them_runs_out_of_memory():
    ranks = run_ranks(OOM_RANKS, 2)
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    assert [rank["copies_per_pass"] for rank in ranks] == [[2, 2], [2, 2]]
    torch.manual_seed(0)
    want = reference_gradient(marian(dropout=0.0), [batch_for("marian", 3, seed=rank) for rank in (0, 1)])
    norm = float(torch.stack([g.norm() for g in want.values()]).norm())
    assert all(abs(rank["norm"] - norm) < 1e-4 * norm for rank in ranks)


# ---- ranks

RANKS = """
import sys
import torch
from accelerate import Accelerator
from distributed import report
from seqba import TrainStep
from tiny_models import batch_for, count, marian, summed_nll
from test_step import Kept
from trainers import summary
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
out = {"num_processes": accelerator.num_processes, "gradients": [], "hooks": [], "buckets": [], "reductions": []}
reductions = [0]
plain_reduce = torch.distributed.all_reduce
def counted_reduce(*args, **kwargs):
    reductions[0] += 1
    return plain_reduce(*args, **kwargs)
torch.distributed.all_reduce = counted_reduce

for smoothing in (0.0, 0.1):
    for accumulation in (1, 2):
        for num_copies, per_pass in ((1, 1), (3, 1), (3, 2), (3, 3), (3, "auto")):
            torch.manual_seed(0)
            model = marian(dropout=0.0)
            optimizer = Kept(model)
            wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.02)
            calls, buckets = [0], set()
            def hook(state, bucket):
                calls[0] += 1
                buckets.add(bucket.index())
                return default_hooks.allreduce_hook(None, bucket)
            wrapped.register_comm_hook(None, hook)
            batches = [batch_for("marian", 3 + rank, seed=10 * rank + i) for i in range(accumulation)]
            step = TrainStep(accelerator, wrapped, optimizer, num_copies=num_copies, copies_per_pass=per_pass,
                             loss_fn=lambda m, rows: summed_nll(m, rows, smoothing), count_fn=count)
            step(batches, update=1)  # DDP rebuilds its buckets after the first update; auto tries its plan
            step(batches, update=1)
            calls[0], reductions[0] = 0, 0
            buckets.clear()
            step(batches, update=2)
            out["hooks"].append(calls[0])
            out["buckets"].append(len(buckets))
            out["reductions"].append(reductions[0] - calls[0])
            out["gradients"].append(summary(optimizer.seen))
report(out)
"""


@pytest.fixture(scope="module")
def two_ranks():
    return run_ranks(RANKS, 2)


@pytest.mark.trap(8)
@pytest.mark.trap(43)
def test_two_ranks_give_the_gradient_of_the_mean_over_all_their_tokens(two_ranks):
    assert [rank["num_processes"] for rank in two_ranks] == [2, 2]
    cells = iter(zip(*(rank["gradients"] for rank in two_ranks), strict=True))
    for smoothing in (0.0, 0.1):
        for accumulation in (1, 2):
            torch.manual_seed(0)
            model = marian(dropout=0.0)
            batches = [
                batch_for("marian", 3 + rank, seed=10 * rank + i) for rank in (0, 1) for i in range(accumulation)
            ]
            want = torch.tensor(summary(reference_gradient(model, batches, smoothing)))
            for _ in range(5):
                for got in next(cells):
                    torch.testing.assert_close(torch.tensor(got), want, rtol=1e-3, atol=1e-5)


@pytest.mark.trap(39)
def test_gradients_are_reduced_once_an_update_whatever_the_plan(two_ranks):
    for rank in two_ranks:
        assert min(rank["buckets"]) > 1
        assert rank["hooks"] == rank["buckets"]
        assert set(rank["reductions"]) == {2}  # of the counts, and of the loss


DISPATCH = """
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from distributed import report
from seqba import BatchAugmentationCollator, copy_ids
from torch.utils.data import DataLoader, default_collate

class Collate:
    def __call__(self, samples):
        batch = BatchAugmentationCollator(default_collate, 2)(samples)
        return {**batch, "copy_ids": copy_ids(2, len(samples))}

def run(**how):
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**how))
    loader = DataLoader([{"input_ids": n} for n in range(16)], batch_size=4, collate_fn=Collate())
    rows = [[x.tolist() for x in (b["input_ids"], b["copy_ids"])] for b in accelerator.prepare(loader)]
    return accelerator.num_processes, rows

processes, dispatched = run(dispatch_batches=True)
report({"num_processes": processes, "rows": dispatched})
"""


@pytest.mark.trap(18)
def test_a_row_of_copy_ids_survives_dispatch_and_names_each_rows_copy():
    ranks = run_ranks(DISPATCH, 2)
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    met = [pair for rank in ranks for ids, copies in rank["rows"] for pair in zip(ids, copies, strict=True)]
    assert sorted(met) == sorted((n, copy) for n in range(16) for copy in range(2))


# ---- arguments


def test_wrong_arguments_name_the_value_and_the_limit():
    model = nn.Linear(2, 2)
    accelerator = Accelerator(cpu=True)

    def build(**options):
        return TrainStep(accelerator, model, Kept(model), loss_fn=summed_nll, count_fn=count, **options)

    with pytest.raises(ValueError, match="num_copies must be a whole number of at least 1, got 0"):
        build(num_copies=0)
    with pytest.raises(ValueError, match="from 1 to the number of copies, 4, got 5"):
        build(num_copies=4, copies_per_pass=5)
    with pytest.raises(ValueError, match="from 1 to the number of copies, 4, got 0"):
        build(num_copies=4, copies_per_pass=0)
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        build(max_norm=0)
    accelerator.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="build it with 1 and give all batches"):
        build()
    assert accelerator.distributed_type == DistributedType.NO


@pytest.mark.trap(21)
def test_the_counts_of_samples_do_not_move_with_m_and_those_of_targets_do():
    model, batch = marian(dropout=0.0), batch_for("marian")
    results = {m: step_gradient(model, [batch], num_copies=m)[1] for m in (1, 4)}
    assert int(results[1].num_samples) == int(results[4].num_samples) == 3
    assert int(results[4].num_targets) == 4 * int(results[1].num_targets)


def test_the_step_repeats_what_the_collator_would():
    batch = batch_for("marian")
    seen = []

    def loss_fn(model, rows):
        seen.append(rows)
        return summed_nll(model, rows)

    model = marian()
    step = TrainStep(
        Accelerator(cpu=True), model, Kept(model), loss_fn=loss_fn, count_fn=count, num_copies=3, copies_per_pass=2
    )
    step([batch], update=1)
    for rows, copies in zip(seen, (2, 1), strict=True):
        for name, x in repeat_batch(batch, copies).items():
            assert torch.equal(rows[name], x)


@pytest.mark.parametrize("wrong", [2.4, torch.tensor(3.0), torch.tensor([3, 4])])
def test_a_count_of_targets_that_is_no_whole_number_is_refused(wrong):
    model = marian()
    step = TrainStep(Accelerator(cpu=True), model, Kept(model), loss_fn=summed_nll, count_fn=lambda batch: wrong)
    with pytest.raises(TypeError, match="count_fn must return a whole number"):
        step([batch_for("marian")], update=1)


def test_a_batch_in_place_of_the_list_of_batches_and_no_batch_are_refused():
    model, batch = marian(), batch_for("marian")
    with pytest.raises(TypeError, match=r"must be a list of the update's batches, got a .*; one batch is \[batch\]"):
        step_gradient(model, batch)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        step_gradient(model, [])
