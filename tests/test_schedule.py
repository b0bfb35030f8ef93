"""Schedules: values against formulas written anew, ranges, and independence of copies and of ranks."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from accelerate import Accelerator

from distributed import run_ranks
from seqba import TrainStep, schedule

SCHEDULES = [
    schedule.inverse_sqrt,
    schedule.transformer,
    schedule.linear,
    schedule.cosine,
    schedule.constant,
    schedule.step_decay,
]
DECAYS = [schedule.linear, schedule.cosine]


@pytest.mark.parametrize("update", [1, 6, 7, 8, 29, 1_000])
def test_inverse_sqrt_and_transformer_equal_vaswani_equation_3(update):
    width, warmup, scale = 48, 7, 0.3
    want = scale * min(1 / math.sqrt(update), update / warmup**1.5) / math.sqrt(width)
    assert schedule.transformer(update, width=width, warmup_updates=warmup, scale=scale) == pytest.approx(want)
    peak = scale * (width * warmup) ** -0.5
    assert schedule.inverse_sqrt(update, peak_lr=peak, warmup_updates=warmup) == pytest.approx(want)


@pytest.mark.parametrize("final", [0.0, 0.03])
@pytest.mark.parametrize(("update", "part"), [(5, 0), (6, 1 / 8), (9, 1 / 2), (12, 7 / 8), (13, 1), (14, 1), (99, 1)])
def test_decays_run_from_the_peak_at_the_last_warmup_update_to_the_final_rate(update, part, final):
    options = {"peak_lr": 0.4, "warmup_updates": 5, "total_updates": 13, "final_lr": final}
    assert schedule.linear(update, **options) == pytest.approx(0.4 + part * (final - 0.4))
    want = final + (0.4 - final) * math.cos(part * math.pi / 2) ** 2  # (1 + cos 2x) / 2
    assert schedule.cosine(update, **options) == pytest.approx(want, abs=1e-15)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_decay_without_warmup_starts_on_its_way_down(decay):
    rates = [decay(t, peak_lr=0.4, warmup_updates=0, total_updates=4) for t in (1, 2, 3, 4)]
    assert 0.4 > rates[0] > rates[1] > rates[2] > rates[3] == 0


@pytest.mark.parametrize("name", ["inverse_sqrt", "linear", "cosine", "constant", "step_decay"])
def test_warmup_rises_by_equal_steps_to_the_peak(name):
    options = {"warmup_updates": 5}
    options |= {"base_lr": 0.4, "boundaries": [50], "factor": 0.1} if name == "step_decay" else {"peak_lr": 0.4}
    options |= {"total_updates": 13} if name in ("linear", "cosine") else {}
    rates = [getattr(schedule, name)(t, **options) for t in range(1, 6)]
    assert rates == pytest.approx([0.08, 0.16, 0.24, 0.32, 0.4])


def test_step_decay_drops_after_each_boundary():
    rates = [schedule.step_decay(t, base_lr=0.3, boundaries=[3, 5], factor=0.2) for t in range(1, 8)]
    assert rates == pytest.approx([0.3, 0.3, 0.3, 0.06, 0.06, 0.012, 0.012])
    assert schedule.step_decay(9, base_lr=0.3, boundaries=[], factor=0.2) == 0.3
    rates = [schedule.step_decay(t, base_lr=0.3, boundaries=[3, 5], factor=[0.5, 0.2]) for t in (3, 4, 5, 6)]
    assert rates == pytest.approx([0.3, 0.15, 0.15, 0.03])


def test_lambda_lr_starts_at_the_first_update_and_may_look_past_the_last():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=1.0)
    rate = {"peak_lr": 0.4, "warmup_updates": 2, "total_updates": 4}
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: schedule.linear(t + 1, **rate))
    used = []
    for _ in range(4):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert used == pytest.approx([0.2, 0.4, 0.2, 0.0])


LINEAR = {"peak_lr": 0.5, "warmup_updates": 5, "total_updates": 9}
STEPS = {"base_lr": 0.5, "boundaries": [3, 5], "factor": 0.1}


@pytest.mark.parametrize(
    ("function", "options", "text"),
    [
        (schedule.inverse_sqrt, {"update": 0, "peak_lr": 0.5, "warmup_updates": 5}, "counted from 1, got 0"),
        (schedule.inverse_sqrt, {"peak_lr": 0.5, "warmup_updates": 0}, "warmup_updates must be at least 1, got 0"),
        (schedule.inverse_sqrt, {"peak_lr": math.nan, "warmup_updates": 5}, "peak_lr must be finite .*, got nan"),
        (schedule.inverse_sqrt, {"peak_lr": math.inf, "warmup_updates": 5}, "peak_lr must be finite .*, got inf"),
        (schedule.transformer, {"width": 0, "warmup_updates": 5}, "width must be at least 1, got 0"),
        (schedule.transformer, {"width": 8, "warmup_updates": 5, "scale": -1}, "scale must be .* at least 0, got -1"),
        (schedule.transformer, {"update": -3, "width": 8, "warmup_updates": 5}, "counted from 1, got -3"),
        (schedule.linear, LINEAR | {"warmup_updates": -1}, "warmup_updates must be at least 0, got -1"),
        (schedule.linear, LINEAR | {"total_updates": 5}, "total_updates must be above warmup_updates=5, got 5"),
        (schedule.linear, LINEAR | {"final_lr": 0.6}, "final_lr must be from 0 to peak_lr=0.5, got 0.6"),
        (schedule.cosine, LINEAR | {"total_updates": 4}, "total_updates must be above warmup_updates=5, got 4"),
        (schedule.cosine, LINEAR | {"final_lr": -0.1}, "final_lr must be from 0"),
        (schedule.cosine, LINEAR | {"update": 0.5}, "counted from 1, got 0.5"),
        (schedule.constant, {"peak_lr": -0.5}, "peak_lr must be .* at least 0, got -0.5"),
        (schedule.constant, {"peak_lr": 0.5, "warmup_updates": -2}, "warmup_updates must be at least 0, got -2"),
        (schedule.step_decay, STEPS | {"boundaries": [5, 5]}, r"strictly rising, got \[5, 5\]"),
        (schedule.step_decay, STEPS | {"boundaries": [0, 5]}, r"at least 1, strictly rising, got \[0, 5\]"),
        (schedule.step_decay, STEPS | {"factor": [0.5]}, r"one number, or one for each of 2 boundaries, got \[0.5\]"),
        (schedule.step_decay, STEPS | {"factor": 0}, "factor must be above 0 and at most 1, got 0"),
        (schedule.step_decay, STEPS | {"base_lr": -1}, "base_lr must be finite and at least 0, got -1"),
    ],
)
def test_arguments_outside_their_range_are_refused(function, options, text):
    with pytest.raises(ValueError, match=text):
        function(**({"update": 1} | options))


@pytest.mark.trap(21)
def test_a_schedule_sees_the_update_and_never_the_copies():
    public = {f for _, f in inspect.getmembers(schedule, inspect.isfunction) if not f.__name__.startswith("_")}
    assert public == set(SCHEDULES)
    for function in SCHEDULES:
        names = list(inspect.signature(function).parameters)
        assert names[0] == "update"
        assert not [name for name in names if "cop" in name or "batch" in name or "sample" in name]


@pytest.mark.trap(21)
@pytest.mark.parametrize("num_copies", [1, 2, 5])
def test_every_number_of_copies_meets_the_same_rates(num_copies):
    model, met = torch.nn.Linear(1, 1, bias=False), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: schedule.inverse_sqrt(t + 1, peak_lr=0.4, warmup_updates=3)
    )
    step = TrainStep(
        Accelerator(cpu=True),
        model,
        optimizer,
        loss_fn=lambda network, rows: network(rows).sum(),  # of gradient 1, so that the weight falls by the rate
        count_fn=len,
        num_copies=num_copies,
        copies_per_pass=1,
    )
    for update in range(1, 7):
        before = model.weight.item()
        step([torch.ones(4, 1)], update=update)
        scheduler.step()
        met.append(before - model.weight.item())
    want = [0.4 * min(t / 3, (3 / t) ** 0.5) for t in range(1, 7)]
    assert met == pytest.approx(want, rel=1e-5)


RATES_AFTER_UPDATES = """
import torch
from accelerate import Accelerator
from distributed import report
from torch.optim.lr_scheduler import LambdaLR
from seqba.schedule import linear

def rate(update):
    return linear(update, peak_lr=0.4, warmup_updates=2, total_updates=9)

accelerator = Accelerator(cpu=True)
torch.manual_seed(0)
model, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
model, other, optimizer, scheduled = accelerator.prepare(
    model, other, torch.optim.SGD(model.parameters(), lr=1.0), torch.optim.SGD(other.parameters(), lr=1.0)
)
scheduler = LambdaLR(scheduled.optimizer, lambda t: rate(t + 1))  # outside `prepare`
rates = []
for update in range(1, 6):
    for group in optimizer.param_groups:
        group["lr"] = rate(update)
    rates.append((optimizer.param_groups[0]["lr"], scheduled.param_groups[0]["lr"]))
    accelerator.backward(model(torch.ones(4, 3)).sum() + other(torch.ones(4, 3)).sum())
    optimizer.step()
    scheduled.step()
    scheduler.step()
report({"num_processes": accelerator.num_processes, "rates": rates})
accelerator.end_training()
"""


@pytest.mark.trap(42)
@pytest.mark.trap(43)
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_rates_after_n_updates_are_equal_on_one_and_two_ranks(num_ranks):
    results = run_ranks(RATES_AFTER_UPDATES, num_ranks)
    assert [result["num_processes"] for result in results] == [num_ranks] * num_ranks
    want = [0.4 * min(t / 2, (9 - t) / 7) for t in range(1, 6)]
    for result in results:
        set_each_update, by_lambda_lr = zip(*result["rates"], strict=True)
        assert list(set_each_update) == pytest.approx(want)
        assert by_lambda_lr == set_each_update


@pytest.mark.trap(43)
def test_run_ranks_refuses_a_rank_that_reports_nothing():
    script = "import os\nfrom distributed import report\nif os.environ['RANK'] == '0': report(0)"
    with pytest.raises(AssertionError, match=r"ranks \['0'\] of \['0', '1'\] reported"):
        run_ranks(script, 2)
