"""What people rely on in a Trainer holds with copies: evaluation, events, checkpoints, resuming, memory."""

import json
import logging
import math

import pytest
import torch
from torch import nn
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from seqba.passes import PassLoop
from seqba.trainer import (
    BatchAugmentationSeq2SeqTrainer,
    BatchAugmentationTrainer,
)
from tiny_models import bart, llama, marian
from trainers import Pad, Samples, Seen, Stream, assert_close, make, trainer_gradients
from trainers import few_objects_to_collect as few_objects_to_collect

# ---- evaluation


@pytest.mark.trap(6)
@pytest.mark.trap(7)
@pytest.mark.parametrize("build", [llama, marian])  # the first divides by the number of items, the second does not
def test_evaluation_and_prediction_see_every_row_once(build, tmp_path):
    rows = []

    def logits(prediction):
        first = prediction.predictions
        return first[0] if isinstance(first, tuple) else first

    def count(prediction):
        rows.append(len(logits(prediction)))
        return {"rows": len(logits(prediction))}

    settings = {"eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    trainer = make(tmp_path, build(0.3), ba_m=4, copies_per_pass=3, settings=settings, compute_metrics=count)
    trainer.train()
    data = Samples("llama", 10, seed=1)
    got = trainer.predict(data)
    assert len(logits(got)) == len(data)
    assert rows == [10, 10]
    plain = make(tmp_path, trainer.model, trainer_class=Trainer, settings=settings)
    assert trainer.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    want = plain.predict(data)
    assert (logits(got) == logits(want)).all()
    assert (got.label_ids == want.label_ids).all()


def test_generation_sees_every_row_once(tmp_path):
    model = bart(0.3)
    args = Seq2SeqTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        predict_with_generate=True,
        generation_max_length=6,
    )
    trainer = BatchAugmentationSeq2SeqTrainer(
        model=model, args=args, train_dataset=Samples("bart", 3), data_collator=Pad(), ba_m=2
    )
    trainer.train()
    assert isinstance(trainer, Seq2SeqTrainer)
    data = Samples("bart", 10, seed=1)
    assert len(trainer.predict(data, max_new_tokens=4, num_beams=2).predictions) == len(data)


# ---- events, steps, counters


class Events(TrainerCallback):
    """The names of the events, in order."""

    def __init__(self):
        self.names = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            return lambda args, state, control, **kwargs: object.__getattribute__(self, "names").append(name)
        return object.__getattribute__(self, name)


def run_of(folder, trainer_class, **options):
    events = Events()
    settings = {
        "learning_rate": 0.01,
        "gradient_accumulation_steps": 2,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "num_train_epochs": 2,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 1,
    }
    trainer = make(folder, llama(0.3), trainer_class=trainer_class, callbacks=[events], settings=settings, **options)
    trainer.train()
    return events.names, trainer


@pytest.mark.trap(21)
def test_events_steps_epochs_and_schedules_do_not_move_with_m(tmp_path):
    plain_events, plain = run_of(tmp_path / "plain", Trainer)
    for num_copies, copies_per_pass in ((1, 1), (4, 3)):
        folder = tmp_path / f"{num_copies}"
        events, trainer = run_of(folder, BatchAugmentationTrainer, ba_m=num_copies, copies_per_pass=copies_per_pass)
        assert events == plain_events
        assert trainer.state.global_step == plain.state.global_step == 4
        for got, want in zip(trainer.state.log_history, plain.state.log_history, strict=True):
            for name in ("step", "epoch", "learning_rate"):
                assert got.get(name) == want.get(name)


@pytest.mark.trap(21)
def test_counters_tell_samples_from_instances_and_survive_a_resume(tmp_path):
    _, trainer = run_of(tmp_path, BatchAugmentationTrainer, ba_m=4)
    data = trainer.train_dataset
    targets = sum(len(row["labels"]) - 1 for row in data.rows)
    train = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["unique_samples"] for row in train] == [6, 7, 13, 14]
    assert [row["seen_instances"] for row in train] == [24, 28, 52, 56]
    assert train[-1]["target_tokens"] == 2 * 4 * targets
    final = trainer.state.log_history[-1]
    ratio = final["seen_instances_per_second"] / final["unique_samples_per_second"]
    assert ratio == pytest.approx(4, rel=1e-2)
    assert final["unique_samples_per_second"] == pytest.approx(final["train_samples_per_second"], rel=1e-2)
    assert not any("unique_samples" in row for row in trainer.state.log_history if "eval_loss" in row)
    assert trainer.counters.seen_instances == 56

    first = tmp_path / "checkpoint-2"
    stored = json.loads((first / "trainer_state.json").read_text())["stateful_callbacks"]
    assert stored["BatchAugmentationCounters"]["args"]["unique_samples"] == 7
    for restores in (False, True):
        settings = {"num_train_epochs": 2, "gradient_accumulation_steps": 2}
        settings["restore_callback_states_from_checkpoint"] = restores
        resumed = make(tmp_path, llama(0.3), ba_m=4, settings=settings)
        resumed.train(resume_from_checkpoint=str(first))
        assert (resumed.counters.unique_samples, resumed.counters.seen_instances) == (14, 56)
        last = resumed.state.log_history[-1]  # rates are of the second epoch alone, of 7 samples
        assert last["unique_samples_per_second"] * last["train_runtime"] == pytest.approx(7, rel=1e-2)
        assert last["seen_instances_per_second"] * last["train_runtime"] == pytest.approx(28, rel=1e-2)
        resumed.train()  # another run counts from zero
        assert resumed.counters.unique_samples == 14


def test_checkpoints_go_from_plain_to_augmented_trainers_and_back(tmp_path):
    _, plain = run_of(tmp_path / "plain", Trainer)
    augmented = make(tmp_path, llama(0.3), ba_m=2, settings={"num_train_epochs": 3, "save_strategy": "epoch"})
    augmented.train(resume_from_checkpoint=get_last_checkpoint(plain.args.output_dir))
    assert augmented.state.global_step == 9
    back = make(tmp_path, llama(0.3), trainer_class=Trainer, settings={"num_train_epochs": 4})
    back.train(resume_from_checkpoint=get_last_checkpoint(tmp_path))
    assert back.state.global_step == 12


# ---- resuming


def weights_of(folder, model, *, resume=None, steps=6, sampling="random", **options):
    settings = {
        "learning_rate": 0.05,
        "max_steps": steps,
        "save_strategy": "steps",
        "save_steps": 4,
        "train_sampling_strategy": sampling,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "lr_scheduler_type": "constant",
    }
    trainer = make(folder, model, settings=settings, **options)
    trainer.train(resume_from_checkpoint=resume)
    return model.state_dict(), [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.trap(24)
@pytest.mark.parametrize("sampling", ["random", "group_by_length", "iterable"])
@pytest.mark.parametrize("streams", [False, True])
def test_a_resumed_run_meets_the_same_samples_and_masks(sampling, streams, tmp_path):
    options = {"ba_m": 3, "copies_per_pass": 2, "reproducible_copies": streams}
    if sampling == "iterable":  # in its first pass: a plain Trainer knows no later ones
        options["data"] = Stream(Samples("llama", 18))
    else:  # in the second epoch
        options["sampling"] = sampling
    torch.manual_seed(1)
    start = llama(0.3).state_dict()

    def fresh():
        model = llama(0.3)
        model.load_state_dict(start)
        return model

    want, losses = weights_of(tmp_path / "whole", fresh(), **options)  # 3 updates an epoch
    weights_of(tmp_path / "cut", fresh(), steps=4, **options)
    torch.manual_seed(99)
    checkpoint = str(tmp_path / "cut" / "checkpoint-4")
    got, resumed = weights_of(tmp_path / "cut", fresh(), resume=checkpoint, **options)
    assert resumed == losses
    for name in want:
        assert torch.equal(got[name], want[name]), name


# ---- memory


class SmallMemory(nn.Module):
    """Runs out of memory when it is given more rows than fit."""

    def __init__(self, model, fits):
        super().__init__()
        self.model, self.fits, self.config = model, fits, model.config

    def forward(self, input_ids, labels=None, attention_mask=None, **kwargs):
        output = self.model(input_ids=input_ids, labels=labels, attention_mask=attention_mask, **kwargs)
        if len(input_ids) > self.fits and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return output


def test_auto_halves_the_copies_and_is_bitwise_as_if_it_had_begun_there(tmp_path, caplog):
    network, data = llama(0.3), Samples("llama", 6)
    settings = {"gradient_accumulation_steps": 2}
    torch.manual_seed(0)
    (want,) = trainer_gradients(tmp_path, SmallMemory(network, 99), data, settings=settings, ba_m=5, copies_per_pass=2)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        (got,) = trainer_gradients(tmp_path, SmallMemory(network, 6), data, settings=settings, ba_m=5)
    assert [record.getMessage()[-6:] for record in caplog.records] == ["with 2"]
    for name in want:
        assert torch.equal(got[name], want[name]), name


class FullBesideGradients(SmallMemory):
    """Runs out of memory only where the gradients of an earlier batch are held."""

    def forward(self, *args, **kwargs):
        alone = all(parameter.grad is None for parameter in self.parameters())
        network = self.model if alone else super().forward
        return network(*args, **kwargs)


def test_a_batch_that_does_not_fit_beside_gradients_halves_too_and_is_then_known_to_fit(tmp_path, monkeypatch):
    network, data = llama(0.3), Samples("llama", 15)
    options = {"ba_m": 4, "reproducible_copies": True}
    settings = {"gradient_accumulation_steps": 5, "num_train_epochs": 2}
    want = trainer_gradients(tmp_path, SmallMemory(network, 99), data, settings=settings, copies_per_pass=4, **options)
    copied, snapshot = [], PassLoop._snapshot

    def spy(loop, model):
        copied.append(any(parameter.grad is not None for parameter in model.parameters()))
        return snapshot(loop, model)

    monkeypatch.setattr(PassLoop, "_snapshot", spy)
    got = trainer_gradients(tmp_path, FullBesideGradients(network, 6), data, settings=settings, **options)
    for update in (0, 1):
        assert_close(got[update], want[update])
    assert 1 <= sum(copied) < 8  # of the eight batches that found gradients: keeping these costs as much memory again


class Counting(BatchAugmentationTrainer):
    """Keeps counts in its `compute_loss`, as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.rows_met, self.metrics = 0, {"train": []}

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.rows_met += len(inputs["input_ids"])
        self.metrics["train"].append(len(inputs["input_ids"]))
        return super().compute_loss(model, inputs, *args, **kwargs)


@pytest.mark.parametrize("fits", [99, 6])
def test_what_compute_loss_counts_is_counted_once_a_row_of_a_pass_that_stands(fits, tmp_path):
    settings = {"gradient_accumulation_steps": 2}
    data = Samples("llama", 9)
    trainer = make(tmp_path, SmallMemory(llama(0.3), fits), data, trainer_class=Counting, ba_m=5, settings=settings)
    trainer.train()
    assert trainer.rows_met == 5 * 9
    assert trainer.metrics["train"] == 3 * ([15] if fits == 99 else [6, 6, 3])


def test_a_resumed_run_goes_on_with_the_copies_that_fitted(tmp_path, caplog):
    settings = {"num_train_epochs": 2, "save_strategy": "epoch"}
    make(tmp_path, SmallMemory(llama(0.3), 6), ba_m=4, settings=settings).train()
    resumed = make(tmp_path, SmallMemory(llama(0.3), 6), ba_m=4, settings=settings | {"num_train_epochs": 3})
    caplog.clear()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.counters.copies_per_pass == 2
    assert not [record for record in caplog.records if "out of memory" in record.getMessage()]


def test_auto_find_batch_size_takes_over_where_one_copy_does_not_fit(tmp_path):
    seen = Seen()
    settings = {"auto_find_batch_size": True, "per_device_train_batch_size": 4}
    model = SmallMemory(llama(0.3), 4)
    model.fits = 2
    trainer = make(tmp_path, model, Samples("llama", 8), ba_m=4, callbacks=[seen], settings=settings)
    trainer.train()
    assert trainer.state.train_batch_size < 4
    assert trainer.state.global_step == math.ceil(8 / trainer.state.train_batch_size)
    assert len(seen.gradients) == trainer.state.global_step


# ---- checkpoints


def test_save_only_model_and_the_best_model_at_the_end(tmp_path):
    settings = {
        "learning_rate": 0.5,
        "num_train_epochs": 3,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_only_model": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
    }
    trainer = make(tmp_path, llama(0.3), ba_m=2, settings=settings)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 3
    assert trainer.state.best_metric == min(losses)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    best = trainer.state.best_model_checkpoint
    again = make(tmp_path, type(trainer.model).from_pretrained(best), trainer_class=Trainer).evaluate()
    assert again["eval_loss"] == pytest.approx(min(losses), rel=1e-6)
    assert not list(tmp_path.glob("checkpoint-*/optimizer.pt"))
