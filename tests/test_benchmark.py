import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import time

import pytest
import sentencepiece
import torch
import transformers
from accelerate.state import AcceleratorState, GradientState

from bad_input import call
from seqba.step import TrainStep
from tasks.benchmark import memory
from tasks.benchmark.ratios import compare
from tasks.benchmark.updates import OwnUpdates
from tasks.cli.errors import UserError
from tasks.finetuning import benchmark as finetuning
from tasks.language_modelling import benchmark as language
from tasks.run.stream import Numbered
from tasks.text.generated.corpus import generate_corpus
from tasks.translation import prepare
from tasks.translation.benchmark import decoding, table
from tasks.translation.benchmark.config import ROWS, TranslationBenchmark
from tasks.translation.benchmark.synthetic import Plan
from tasks.translation.benchmark.trainer import Seq2SeqTrainerUpdates
from tasks.translation.benchmark.updates import BareUpdates
from tasks.translation.train import training
from tasks.vision import benchmark as vision
from tasks.vision.data import sources
from tasks.vision.pipelines import DevicePipeline, WorkerPipeline

TINY = {"width": 16, "ffn_width": 24, "num_layers": 1, "num_heads": 2}


class Clock:
    """A `time.perf_counter` that goes on where a test says what takes time, and a microsecond at every reading."""

    def __init__(self, monkeypatch):
        self.now, self._monkeypatch = 0.0, monkeypatch
        monkeypatch.setattr(time, "perf_counter", self)

    def __call__(self):
        self.now += 1e-6  # rates of what no test is about divide by its time
        return self.now

    def sets(self, owner, name, seconds):
        """Let calls of `owner.name` take so long in all, or as long as `seconds` of their arguments."""
        work = getattr(owner, name)

        @functools.wraps(work)
        def timed(*args, **kwargs):
            end = self.now + (seconds(*args, **kwargs) if callable(seconds) else seconds)
            result = work(*args, **kwargs)
            self.now = end
            return result

        self._monkeypatch.setattr(owner, name, timed)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@functools.cache
def _text(seed):
    return generate_corpus(train=6_000, valid=30, test=40, seed=seed)


@pytest.fixture
def config(cache, monkeypatch):
    """The generated preset, with a model that costs nothing and its text drawn once."""
    training = TranslationBenchmark.training
    monkeypatch.setattr(prepare, "generate_corpus", _text)
    monkeypatch.setattr(TranslationBenchmark, "training", lambda self, **changes: training(self, **{**TINY, **changes}))
    yield TranslationBenchmark(preset="generated", cache_dir=cache, cpu=True, updates=2, pairs=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_bare_loop_and_the_training_script_do_the_same_batches(config, monkeypatch):
    seen = []
    call = TrainStep.__call__

    def spy(self, batches, *, update):
        seen.extend(batches)
        return call(self, batches, update=update)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    own = OwnUpdates(training, config.training())
    targets, _ = own.advance(3)
    own.close()
    bare = BareUpdates(config.training(), num_batches=3)
    assert len(bare._batches) == len(seen) == 3
    for a, b in zip(seen, bare._batches, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in b)
    assert targets == sum(int((batch["labels"] != -100).sum()) for batch in seen)
    bare.advance(3)


def test_the_trainers_updates_have_as_many_padded_tokens_within_two_percent(config, monkeypatch):
    theirs = Seq2SeqTrainerUpdates(config.training())
    ours, padded = theirs.padded_tokens
    assert abs(padded / ours - 1) < 0.02
    seen = []
    step = transformers.Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(int((inputs["labels"] != -100).sum()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", spy)
    targets, seconds = theirs.advance(3)
    assert len(seen) == 5  # two are not timed
    assert targets == sum(seen[2:])
    assert seconds > 0


def test_a_ratio_is_the_median_of_pairs_in_turn_after_the_warm_up(clock):
    order, seconds = [], iter([100.0, 5.0, 1.0, 4.0, 2.0, 3.0])

    def a():
        order.append("a")
        clock.now += next(seconds)

    def b():
        order.append("b")
        clock.now += 2.0

    ratio = compare(a, b, pairs=5, warm_up=1)
    assert "".join(order) == "ab" * 6
    found = (ratio.low, ratio.median, ratio.high, ratio.seconds_a, ratio.seconds_b)
    assert found == pytest.approx((0.75, 1.5, 2.25, 3.0, 2.0), abs=1e-4)
    assert "1.500 (quartiles 0.750 to 2.250 of 5 pairs; medians 3000.0 ms over 2000.0 ms)" in str(ratio)


def test_a_machine_that_slows_down_leaves_the_ratio_unchanged(clock):
    drift = [1.0, 2.0, 4.0, 8.0]
    first, second = iter([3 * x for x in drift]), iter([2 * x for x in drift])

    def spend(seconds):
        clock.now += next(seconds)

    ratio = compare(lambda: spend(first), lambda: spend(second), pairs=4, warm_up=0)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.5, 1.5, 1.5), abs=1e-4)


# ---- the rows of the translation task, with known times


def test_the_trainer_row_is_our_rate_of_target_tokens_over_the_fastest_trainers(config, clock, monkeypatch):
    ours, theirs = [], []
    step, training_step = TrainStep.__call__, transformers.Trainer.training_step

    def spy(self, *args, **kwargs):
        result = step(self, *args, **kwargs)
        ours.append(int(result.num_targets))
        return result

    def spy_theirs(self, model, inputs, *args, **kwargs):
        theirs.append(int((inputs["labels"] != -100).sum()))
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    monkeypatch.setattr(transformers.Trainer, "training_step", spy_theirs)
    clock.sets(TrainStep, "__call__", 1.0)
    clock.sets(
        transformers.Trainer,
        "training_step",
        lambda trainer, *args: 3.0 if trainer.args.dataloader_num_workers == 1 else 5.0,
    )
    (row,) = table.trainer(config)
    assert len(ours) == 2 + 2 * 2
    assert len(theirs) == 3 * (2 + 8) + 2 * (2 + 2)  # two of every `train` call are not timed
    timed = [(ours[2:4], theirs[32:34]), (ours[4:6], theirs[36:38])]
    want = statistics.median((sum(a) / 2) / (sum(b) / 6) for a, b in timed)
    assert row.figure == f"{want:.3f}"
    assert "1 loader workers" in row.detail


def test_the_bare_row_is_the_seconds_of_the_loop_over_ours(config, clock):
    clock.sets(BareUpdates, "_update", 3.0)
    clock.sets(TrainStep, "__call__", 4.0)
    (row,) = table.bare(config)
    assert row.figure == "0.750"
    assert "2 pairs" in row.detail


def test_the_fused_row_is_an_update_of_m_copies_over_m_updates(config, clock):
    clock.sets(TrainStep, "__call__", lambda step, *args, **kwargs: 6.0 if len(step.plan.copies) == 3 else 4.0)
    (row,) = table.fused(dataclasses.replace(config, ba_m=3, updates=7))  # 2 updates of 3 copies, 6 of one
    assert row.figure == "0.500"
    assert "medians 12000.0 ms over 24000.0 ms" in row.detail


def test_the_waiting_row_is_the_time_of_batches_over_the_time_of_updates(config, clock):
    clock.sets(Numbered, "__getitems__", 1.0)
    clock.sets(TrainStep, "__call__", lambda step, *args, **kwargs: 3.0 if len(step.plan.copies) == 1 else 9.0)
    (row,) = table.waiting(config)
    assert row.figure == "M=1: 25.00%, M=8: 10.00%"
    assert row.detail == "M=1: mean 1000.00 ms a batch, M=8: mean 1000.00 ms a batch"


def test_the_memory_rows_are_the_peaks_of_m_copies_over_one_and_of_the_lean_loss_over_the_plain(config, monkeypatch):
    mib = {  # M, K, lean, V: without gaps, with them
        (8, 1, True, 8_000): (110, 130),
        (1, 1, True, 8_000): (100, 100),
        (4, 4, True, 32_000): (90, 100),
        (4, 4, False, 32_000): (200, 250),
    }

    def run(command, *, env, **options):
        plan = json.loads(command[-1])
        peaks = mib[plan["num_copies"], plan["copies_per_pass"], plan["lean"], plan["vocab_size"]]
        peak = peaks["MALLOC_MMAP_THRESHOLD_" not in env]
        return subprocess.CompletedProcess(command, 0, stdout=f"a note\n{peak << 20}\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    copies, loss = table.memory(config)
    assert (copies.figure, loss.figure) == ("1.100", "0.450")
    assert "110 MiB over 100 MiB" in copies.detail
    assert copies.detail.endswith("1.300")
    assert "90 MiB over 200 MiB" in loss.detail
    assert loss.detail.endswith("0.400")


@pytest.mark.slow
def test_one_copy_a_pass_holds_what_one_copy_does_and_the_lean_loss_less_than_the_plain(config, monkeypatch):
    held = functools.cache(functools.partial(memory.peak_bytes, with_gaps=False))
    monkeypatch.setattr(memory, "peak_bytes", lambda module, plan, with_gaps: held(module, plan))  # four, not eight
    monkeypatch.setattr(table, "Plan", functools.partial(Plan, num_samples=10, width=64, num_layers=1))
    copies, loss = table.memory(config)
    assert 0.8 < float(copies.figure) < 1.3
    assert 0 < float(loss.figure) < 0.6


def test_the_preprocessing_row_is_the_seconds_of_the_loop_over_ours(config, clock):
    clock.sets(sentencepiece.SentencePieceProcessor, "encode", 0.25)  # 6 000 pairs, 1 000 lines a call
    clock.sets(table, "encode_pairs", 4.0)
    (row,) = table.preprocessing(config)
    assert row.figure == "0.750"
    assert "6,000 pairs" in row.name


def test_the_decoding_row_is_the_seconds_in_file_order_over_ours(config, clock, monkeypatch):
    monkeypatch.setattr(decoding, "_TRAINED_UPDATES", 2)
    clock.sets(transformers.GenerationMixin, "generate", 3.0)  # twice, of 32 sentences and of 8
    clock.sets(decoding, "translate", 4.0)
    (row,) = table.decoding(dataclasses.replace(config, sentences=40))
    assert row.figure == "1.50"
    assert "40 sentences" in row.name
    assert "10.0 sentences/s, 4.0 s in all; a model of 2 updates" in row.detail


def test_the_streams_rows_are_updates_with_reproducible_copies_over_updates_without(clock, monkeypatch, capsys):
    shape = {"num_samples": 2, "length": 3, "vocab_size": 11, "width": 8, "num_layers": 1}
    monkeypatch.setattr(table, "Plan", functools.partial(Plan, **shape))
    seconds = {(True, 3): 6.0, (False, 3): 5.0, (True, 1): 11.0, (False, 1): 10.0}
    clock.sets(
        TrainStep,
        "__call__",
        lambda step, *args, **kwargs: seconds[step._loop.copy_seed is not None, step.plan.copies_per_pass],
    )
    options = ["translation", "--preset", "generated", "--rows", "streams", "--ba-m", "3", "--pairs", "2", "--cpu"]
    verdict = call("benchmark.py", options, monkeypatch, capsys)
    assert verdict.status == 0, verdict
    assert "M=3, 3 a pass: 1.200 (wanted: at most 1.15)" in verdict.stdout
    assert "M=3, 1 a pass: 1.100 (wanted: at most 1.15)" in verdict.stdout


def test_every_row_has_a_measurement():
    assert tuple(table.MEASUREMENTS) == ROWS


def test_trainers_with_and_without_copies_meet_the_same_samples_and_time_the_same_updates(cache, clock, monkeypatch):
    seen = []
    step = transformers.Trainer.training_step

    def spy(self, model, inputs, *args, **kwargs):
        seen.append(inputs["input_ids"][:2].tolist())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", spy)
    clock.sets(transformers.Trainer, "training_step", 3.0)
    updates = finetuning.TrainerUpdates(finetuning.FinetuningBenchmark(cache_dir=cache, cpu=True, batch_size=2))
    assert updates.seconds(2) == pytest.approx(6.0, abs=1e-4)
    plain = seen.copy()
    seen.clear()
    updates.seconds(2, finetuning.BatchAugmentationTrainer, ba_m=2, copies_per_pass=1)
    assert len(plain) == 5  # three are not timed
    assert seen == [batch for batch in plain for _ in range(2)]


@pytest.mark.parametrize(("row", "figure"), [("plain", "1.500"), ("fused", "3.500")])
def test_a_row_about_the_trainer_is_an_update_with_copies_over_a_plain_one(row, figure, cache, clock):
    def seconds(trainer, *args):
        if not isinstance(trainer, finetuning.BatchAugmentationTrainer):
            return 2.0
        return {1: 3.0, 2: 7.0}[trainer.ba_args.ba_m]

    clock.sets(transformers.Trainer, "training_step", seconds)
    config = finetuning.FinetuningBenchmark(
        task="causal", cache_dir=cache, cpu=True, ba_m=2, updates=5, pairs=2, batch_size=2
    )
    (measured,) = finetuning.MEASUREMENTS[row](config)
    assert measured.figure == figure
    assert "2 pairs" in measured.detail


# ---- language modelling


@pytest.fixture
def words(cache, monkeypatch):
    """Random words of a small vocabulary, for a model that costs nothing."""
    tiny = {"embedding_size": 6, "hidden_size": 8, "num_layers": 2, "batch_size": 3, "bptt": 9}
    training = language.LanguageModelBenchmark.training
    monkeypatch.setattr(
        language.LanguageModelBenchmark, "training", lambda self, **changes: training(self, **{**tiny, **changes})
    )
    monkeypatch.setattr(language, "_LINES", 100)
    yield language.LanguageModelBenchmark(vocab_size=30, cache_dir=cache, cpu=True, updates=2, pairs=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_bare_stack_reads_the_windows_of_the_training_script_and_is_its_model_without_dropout(words, monkeypatch):
    seen = []
    call = TrainStep.__call__

    def spy(self, batches, *, update):
        seen.extend(batches)
        return call(self, batches, update=update)

    monkeypatch.setattr(TrainStep, "__call__", spy)
    own = OwnUpdates(language.training, words.training())
    own.advance(3)
    own.close()
    bare = language.BareUpdates(words.training(), num_batches=3)
    for window, batch in zip(itertools.islice(bare._windows, 3), seen, strict=True):
        assert all(torch.equal(x, batch[name]) for name, x in window.items())
    own_model = language.AwdLstmForCausalLM(
        language.AwdLstmConfig(vocab_size=30, embedding_size=6, hidden_size=8, num_hidden_layers=2)
    )
    assert sum(p.numel() for p in bare._parameters) == own_model.num_parameters()
    before = [parameter.detach().clone() for parameter in bare._parameters]
    bare.advance(3)
    assert all(not torch.equal(x, y) for x, y in zip(before, bare._parameters, strict=True))


def test_the_rows_of_language_modelling_are_what_they_say(words, clock):
    def seconds(step, *args, **kwargs):
        scopes = {one.mask_scope for one in step.model.modules() if hasattr(one, "mask_scope")}
        return {1: 3.0, 2: 9.0 if scopes == {"per_copy"} else 6.0}[len(step.plan.copies)]

    clock.sets(language.BareUpdates, "_update", 2.0)
    clock.sets(TrainStep, "__call__", seconds)
    clock.sets(Numbered, "__getitems__", 1.0)
    fused = dataclasses.replace(words, ba_m=2)
    rows = [language.MEASUREMENTS[row](fused)[0].figure for row in ("bare", "fused", "scopes", "waiting")]
    assert rows == ["2.000", "0.875", "1.429", "M=1: 25.00%"]  # a window takes a second more in the training script
    assert tuple(language.MEASUREMENTS) == language.ROWS


def test_the_memory_row_of_language_modelling_is_the_peak_of_eight_copies_over_one(words, monkeypatch):
    plans = []

    def peak(module, plan, *, with_gaps):
        plans.append(plan)
        return plan.num_copies + 12

    monkeypatch.setattr(memory, "peak_bytes", peak)
    (row,) = language.memory(words)
    assert row.figure == f"{20 / 13:.3f}"
    assert {plan.hidden_size for plan in plans} == {8}
    assert torch.tensor(language.update_of(plans[0])()).isfinite()


# ---- vision


@pytest.fixture
def pictures(cache, monkeypatch):
    monkeypatch.setattr(sources, "_DRAWN", {"train": 12, "valid": 2, "test": 2})
    monkeypatch.setattr(vision, "_PHOTOGRAPHS", {"train": 8, "val": 1, "test": 1})
    monkeypatch.setattr(vision, "_SIZE", (40, 32))
    yield vision.VisionBenchmark(
        network="resnet8", photo_network="resnet8", photo_size=16, batch_size=4, photo_batch_size=4, cache_dir=cache,
        cpu=True, ba_m=2, updates=2, pairs=2,
    )  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_the_rows_of_vision_are_what_they_say(pictures, clock):
    clock.sets(vision.BareUpdates, "_update", lambda loop, images, labels: 0.5 * len(images))
    clock.sets(TrainStep, "__call__", lambda step, *args, **kwargs: 1.0 + 3.0 * len(step.plan.copies))
    clock.sets(WorkerPipeline, "load", lambda pipeline, *args: 1.0 + len(pipeline.copies))
    clock.sets(DevicePipeline, "take_copies", lambda pipeline, batch, copies: 0.25 * len(copies))
    rows = {name: [float(row.figure) for row in measure(pictures)] for name, measure in vision.MEASUREMENTS.items()}
    assert rows["loader"] == pytest.approx([11 / 2, 10 * 2 / 11], abs=1e-3)
    assert rows["bare"] == pytest.approx([2 / 4], abs=1e-3)  # seconds of the bare loop over the script's
    assert rows["device"] == pytest.approx([0.25 / 4], abs=1e-3)
    assert rows["fused"] == pytest.approx([7 / 8], abs=1e-3)
    assert rows["repeated"] == pytest.approx([8 / (13 + 4 * 5)], abs=1e-3)  # as many rows: 16 of 4 images
    assert tuple(vision.MEASUREMENTS) == vision.ROWS


def test_the_loop_of_timm_sees_each_photograph_four_times_an_update(pictures, monkeypatch):
    met = []
    monkeypatch.setattr(vision.BareUpdates, "_update", lambda loop, images, labels: met.append(images))
    vision.repeated(pictures)
    assert {tuple(images.shape) for images in met} == {(16, 3, 16, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ba_m": 1}, "--ba-m must be at least 2"), ({"task": "speech"}, "got speech"), ({"rows": ["x"]}, "got x")],
)
def test_bad_options_about_the_trainer_are_named(change, message):
    with pytest.raises(UserError, match=message):
        finetuning.FinetuningBenchmark(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ba_m": 1}, "--ba-m must be at least 2, got 1"),
        ({"pairs": 1}, "--pairs must be at least 2, got 1"),
        ({"rows": ["speed"]}, "--rows must be one of trainer, .* got speed"),
    ],
)
def test_bad_options_are_named(change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TranslationBenchmark(), **change)


@pytest.mark.parametrize("is_named", [True, False])
@pytest.mark.parametrize(
    ("files", "preset"),
    [
        ([], "generated"),
        (["val.en", "val.de"], "generated"),
        (["train.en.gz"], "generated"),
        (["train.en.gz", "train.de"], "multi30k-small"),
    ],
)
def test_the_preset_is_multi30k_only_where_its_training_text_is_found(files, preset, is_named, tmp_path, monkeypatch):
    (tmp_path / "multi30k").mkdir()
    for file in files:
        (tmp_path / "multi30k" / file).touch()
    if is_named:
        monkeypatch.delenv("SEQBA_DATA", raising=False)
    else:
        monkeypatch.setenv("SEQBA_DATA", str(tmp_path))
    config = TranslationBenchmark(data_dir=str(tmp_path) if is_named else None)
    assert config.training().config.preset == preset
    named = dataclasses.replace(config, preset="transformer-base-wmt16")
    assert named.training().config.preset == "transformer-base-wmt16"


def test_without_a_data_folder_the_preset_is_generated(monkeypatch):
    monkeypatch.delenv("SEQBA_DATA", raising=False)
    assert TranslationBenchmark().training().config.preset == "generated"


def test_the_script_wants_a_task(monkeypatch, capsys):
    for options in ([], ["--rows", "bare", "translation"]):
        verdict = call("benchmark.py", options, monkeypatch, capsys)
        assert (verdict.status, verdict.stdout) == (1, "")
        assert verdict.error.startswith(
            "error: name first what to measure, one of translation, finetuning, language-modelling, vision; each has a"
        )


def test_a_value_that_is_a_tasks_name_is_no_task(monkeypatch, capsys):
    options = ["finetuning", "--cache-dir", "translation", "--task", "translation"]
    verdict = call("benchmark.py", options, monkeypatch, capsys)
    assert verdict.error == "error: --task must be one of seq2seq, causal, classification, got translation"


def test_an_option_that_no_benchmark_has_is_named_before_values_are_looked_at(monkeypatch, capsys):
    verdict = call("benchmark.py", ["finetuning", "--bogus", "1", "--rows", "none"], monkeypatch, capsys)
    assert verdict.error == "error: unknown option --bogus 1; --help lists them all"


def test_the_scripts_help_names_the_tasks(monkeypatch, capsys):
    verdict = call("benchmark.py", ["--help"], monkeypatch, capsys)
    assert verdict.status == 0
    assert "Tasks: translation, finetuning" in verdict.stdout
