import dataclasses

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

from bad_input import call
from seqba.step import TrainStep
from tasks.errors import UserError
from tasks.finetuning import benchmark as finetuning
from tasks.translation.benchmark import table
from tasks.translation.benchmark.config import ROWS, BenchmarkConfig
from tasks.translation.benchmark.trainer import TrainerUpdates
from tasks.translation.benchmark.updates import BareUpdates, OwnUpdates

TINY = {"width": 16, "ffn_width": 24, "num_layers": 1, "num_heads": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def config(cache, monkeypatch):
    """The generated preset, with a model that costs nothing."""
    training = BenchmarkConfig.training
    monkeypatch.setattr(BenchmarkConfig, "training", lambda self, **changes: training(self, **{**TINY, **changes}))
    yield BenchmarkConfig(preset="generated", cache_dir=cache, cpu=True, updates=2, pairs=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_bare_loop_and_the_training_script_do_the_same_batches(config, monkeypatch):
    seen = []
    call = TrainStep.__call__

    def spy(self, batches, *, update):
        seen.extend(batches)
        return call(self, batches, update=update)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    own = OwnUpdates(config.training())
    targets = own.advance(3)
    own.close()
    bare = BareUpdates(config.training(), num_batches=3)
    assert len(bare._batches) == len(seen) == 3
    for a, b in zip(seen, bare._batches, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert targets == sum(int((batch["labels"] != -100).sum()) for batch in seen)
    bare.advance(3)


def test_the_trainers_updates_have_as_many_padded_tokens_within_two_percent(config, monkeypatch):
    theirs = TrainerUpdates(config.training())
    ours, padded = theirs.padded_tokens
    assert abs(padded / ours - 1) < 0.02
    seen = []
    step = transformers.Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(int((inputs["labels"] != -100).sum()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", spy)
    targets, seconds = theirs.advance(3)
    theirs.close()
    assert len(seen) == 5  # two are not timed
    assert targets == sum(seen[2:])
    assert seconds > 0


@pytest.mark.parametrize("row", ["bare", "fused", "waiting", "preprocessing"])
def test_a_row_says_its_figure_and_how_it_came_about(config, row):
    (measured,) = table.MEASUREMENTS[row](config)
    assert measured.figure in str(measured)
    assert measured.wanted in str(measured)
    assert "pairs" in measured.detail or "M=8" in measured.detail


def test_every_row_has_a_measurement():
    assert tuple(table.MEASUREMENTS) == ROWS


def test_the_trainers_with_and_without_copies_meet_the_same_samples_and_time_the_same_updates(cache, monkeypatch):
    seen = []
    step = transformers.Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"][:2].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", spy)
    updates = finetuning.TrainerUpdates(finetuning.BenchmarkConfig(cache_dir=cache, cpu=True, batch_size=2))
    assert 0 < updates.seconds(2) < 60
    plain = seen.copy()
    seen.clear()
    updates.seconds(2, finetuning.BatchAugmentationTrainer, ba_m=2, copies_per_pass=1)
    assert len(plain) == 5  # three are not timed
    assert seen == [batch for batch in plain for _ in range(2)]


@pytest.mark.parametrize("row", finetuning.ROWS)
def test_a_row_about_the_trainer_says_its_figure(row, cache):
    config = finetuning.BenchmarkConfig(task="causal", cache_dir=cache, cpu=True, updates=2, pairs=2, batch_size=2)
    (measured,) = finetuning.MEASUREMENTS[row](config)
    assert float(measured.figure) > 0
    assert "2 pairs" in str(measured)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ba_m": 1}, "--ba-m must be at least 2"), ({"task": "speech"}, "got speech"), ({"rows": ["x"]}, "got x")],
)
def test_bad_options_about_the_trainer_are_named(change, message):
    with pytest.raises(UserError, match=message):
        finetuning.BenchmarkConfig(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ba_m": 1}, "--ba-m must be at least 2, got 1"),
        ({"pairs": 1}, "--pairs must be at least 2, got 1"),
        ({"rows": ["speed"]}, "--rows must be of trainer, .* got speed"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(BenchmarkConfig(), **change)


def test_the_script_wants_a_task(monkeypatch, capsys):
    verdict = call("benchmark.py", [], monkeypatch, capsys)
    assert (verdict.status, verdict.stdout) == (1, "")
    assert verdict.error == "error: name what to measure, one of translation, finetuning; each has a --help of its own"


def test_the_scripts_help_names_the_tasks(monkeypatch, capsys):
    verdict = call("benchmark.py", ["--help"], monkeypatch, capsys)
    assert verdict.status == 0
    assert "Tasks: translation, finetuning" in verdict.stdout
