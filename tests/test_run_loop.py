"""`Run` knows no task: its figures, its best checkpoint, and state that is neither weights nor JSON, on a toy task."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from distributed import run_ranks
from seqba import CarriedState, CopyGroup, TrainStep
from tasks.run import loop
from tasks.run.checkpoints import Saver
from tasks.run.log import read_metrics
from tasks.run.loop import Run
from tasks.run.options import RunOptions
from tasks.run.progress import Figures, Progress

IMAGES = Figures(
    target="image", loss="loss (nats per image)", training="training", metric="accuracy", higher_is_better=True
)
ACCURACIES = {2: 0.25, 4: 0.75, 6: 0.5}  # the best is neither the first nor the last


class Killed(BaseException):
    """Ends a run as a kill does."""


def averaged(optimizer):
    """The averages that torch's ASGD keeps beside the weights."""
    return {i: state["ax"].clone() for i, state in enumerate(optimizer.state.values())}


def run(folder, *, figures=IMAGES, kill_at=None, save_every=3, **changes):
    """Six updates of a model whose loss carries a state on; a validation every second one."""
    options = RunOptions(max_updates=6, log_every=1, eval_every=2, save_every=save_every, **changes)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.GRU(3, 4, batch_first=True)
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1, t0=0)
    carried = CarriedState(lambda rows: torch.zeros(1, rows, 4))

    def loss_fn(network, rows):
        output, state = network(nn.functional.dropout(rows["x"], 0.5), carried.take(len(rows["x"])))
        carried.keep(state)
        return output.square().sum()

    step = TrainStep(
        accelerator, model, optimizer, loss_fn=loss_fn, count_fn=lambda rows: len(rows["x"]), num_copies=2,
        carried=[carried],
    )  # fmt: skip
    its = Run(accelerator, folder, options, {"seed": 0}, group=CopyGroup(2), figures=figures)
    its.attach(model, optimizer, carried={"hidden": carried}, step=step)
    averages = {}
    for update in its.updates():
        if update == kill_at:
            raise Killed
        rows = {"x": torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(update))}
        its.record(update, step([rows], update=update), [update])
        averages[update] = averaged(optimizer)
        figure = ACCURACIES.get(update)
        its.log(
            {"valid_loss": 3.0 - update, "accuracy": figure} if its.must_validate else None, lr=0.1, window=70 + update
        )
        its.save_if_due()
    last = {name: x.clone() for name, x in model.state_dict().items()}
    its.load_best()
    its.finish({"top1_accuracy": 0.7})
    return its, averages, averaged(optimizer), last


@pytest.mark.trap(59)
def test_the_best_checkpoint_is_the_one_of_the_tasks_own_metric_in_its_own_direction(tmp_path):
    its, averages, best, _ = run(tmp_path / "up", keep_checkpoints=1)
    assert (its.progress.best_update, its.progress.best_value) == (4, 0.75)
    assert all(torch.equal(best[i], averages[4][i]) for i in best)  # weights that are averaged go back with the others
    assert not torch.equal(best[0], averages[6][0])
    assert sorted(path.name for path in (tmp_path / "up" / "checkpoints").iterdir()) == [
        "update-000004",
        "update-000006",
    ]
    down, _, _, _ = run(tmp_path / "down", figures=dataclasses.replace(IMAGES, higher_is_better=False))
    assert (down.progress.best_update, down.progress.best_value) == (2, 0.25)


@pytest.mark.trap(59)
@pytest.mark.parametrize(("keep", "newest"), [(1, [6]), (2, [5, 6]), (3, [4, 5, 6]), (9, [1, 3, 4, 5, 6])])
def test_so_many_newest_checkpoints_are_kept_and_the_best_however_old(keep, newest, tmp_path):
    falling = dataclasses.replace(IMAGES, higher_is_better=False)  # best after update 2
    its, _, _, _ = run(tmp_path / "run", figures=falling, save_every=1, keep_checkpoints=keep)
    assert its.progress.best_update == 2
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"update-{n:06d}" for n in sorted([2, *newest])]


def test_a_row_holds_the_means_of_its_own_updates_alone():
    progress = Progress()

    def row(*updates):
        for loss, norm in updates:
            progress.count(loss, norm, samples=5, targets=20, num_copies=2, max_norm=2.0)
        closed = progress.close_window(IMAGES, {})
        return [closed[name] for name in ("loss", "grad_norm", "clip_fraction", "unique_samples", "target_images")]

    assert row((4.0, 3.0), (2.0, 1.0), (1.5, 0.5)) == [2.5, 1.5, pytest.approx(1 / 3), 15, 60]
    assert row((6.0, 5.0), (8.0, 7.0)) == [7.0, 6.0, 1.0, 25, 100]
    assert row((3.0, 2.0)) == [3.0, 2.0, 0.0, 30, 120]  # at the limit nothing is clipped


@pytest.mark.trap(24)
def test_the_loss_scaler_goes_on_where_it_was(tmp_path):
    def saver(**scaler):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)  # of fp16, which accelerate has on GPUs alone
        model = nn.Linear(2, 3)
        parts = {"optimizer": torch.optim.SGD(model.parameters()), "parts": {}, "carried": {}}
        return accelerator.scaler, Saver(accelerator, tmp_path, 2, model=model, group=CopyGroup(1), **parts)

    before, of_before = saver(init_scale=512.0, growth_interval=7)
    before.scale(torch.ones(()))
    before.load_state_dict(before.state_dict() | {"_growth_tracker": 5})
    of_before.save(1, pinned=())
    after, of_after = saver()
    after.scale(torch.ones(()))
    of_after.resume()
    assert after.state_dict() == before.state_dict()
    assert (after.get_scale(), after.state_dict()["_growth_tracker"]) == (512.0, 5)


def test_the_rate_that_is_shown_is_of_what_was_done_since_the_start(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    its = Run(Accelerator(cpu=True), tmp_path, RunOptions(max_updates=9), {}, group=CopyGroup(2), figures=IMAGES)
    model = nn.Linear(2, 3)
    its.attach(model, torch.optim.SGD(model.parameters()))
    its.progress.update, its.progress.targets = 7, 5_000  # as a resume leaves it
    updates: Any = its.updates()
    next(updates)
    its.progress.targets, now[0] = 5_036, 103.0
    its._show(1.0)
    assert ", 12 images/s" in its._bar.postfix
    updates.close()


def test_rows_results_and_curve_speak_the_tasks_words_and_hold_its_columns(tmp_path):
    run(tmp_path / "run")
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["window"] for row in rows] == [71, 72, 73, 74, 75, 76]
    assert [row.get("accuracy") for row in rows] == [None, 0.25, None, 0.75, None, 0.5]
    assert [row["target_images"] for row in rows] == [10 * n for n in range(1, 7)]  # 5 samples, twice each
    assert not any("token" in name for name in rows[0])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["accuracy"], results["best_update"], results["top1_accuracy"]) == (0.75, 4, 0.7)
    assert "valid_loss" not in results
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000


@pytest.mark.trap(24)
def test_a_killed_run_goes_on_with_its_hidden_states_bitwise(tmp_path):
    _, want_averages, _, want = run(tmp_path / "straight")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=6, save_every=1)
    _, averages, _, got = run(tmp_path / "killed", save_every=1, resume=True)
    assert list(averages) == [6]  # what was done again
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert all(torch.equal(want_averages[6][i], averages[6][i]) for i in averages[6])


def test_a_figure_of_a_validation_that_is_not_finite_stops_the_run_by_its_name(tmp_path, monkeypatch):
    monkeypatch.setitem(ACCURACIES, 4, float("nan"))
    with pytest.raises(Exception, match="the validation's accuracy after update 4 is nan"):
        run(tmp_path / "run")


RANKS = """
import sys
from pathlib import Path
import torch
from accelerate import Accelerator
from distributed import report
from seqba import CarriedState, CopyGroup, copies_of_pass
from tasks.run.checkpoints import Saver

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index

def saver(carried):
    model = torch.nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters())
    parts = {"parts": {}, "carried": {"hidden": carried}}
    return Saver(accelerator, Path(sys.argv[1]), 2, model=model, optimizer=optimizer,
                 group=CopyGroup(accelerator.num_processes, rank, accelerator.num_processes), **parts)

state = CarriedState(lambda rows: torch.zeros(rows), dim=0)
with copies_of_pass((rank,)):
    state.keep(torch.full((5,), 10.0 + rank))
saver(state).save(1, pinned=())
again = CarriedState(lambda rows: torch.zeros(rows), dim=0)
saver(again).resume()
report({"num_processes": accelerator.num_processes, "state": {k: x.tolist() for k, x in again.state_dict().items()}})
"""


@pytest.mark.trap(24)
@pytest.mark.trap(43)
def test_every_rank_finds_its_own_hidden_states_again(tmp_path):
    ranks = run_ranks(RANKS, 2, args=[str(tmp_path)])
    assert [rank["num_processes"] for rank in ranks] == [2, 2]
    assert [rank["state"] for rank in ranks] == [{"0.0.0": [10.0] * 5}, {"0.1.0": [11.0] * 5}]
