import dataclasses
import itertools
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from distributed import run_ranks
from seqba.groups import CopyGroup
from seqba.step import UpdateResult
from tasks.cli.errors import RunError, UserError
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.run.guards import NonFiniteError
from tasks.run.log import read_metrics
from tasks.run.loop import Run
from tasks.run.options import RunOptions
from tasks.text.generated.corpus import generate_corpus
from tasks.text.parallel import ParallelText, read_lines
from tasks.translation import prepare, result
from tasks.translation import train as training
from tasks.translation.config import parse_config
from tasks.translation.model import TranslationLoss

TINY = parse_config([]).changed(
    width=16,
    ffn_width=24,
    num_layers=1,
    num_heads=2,
    vocab_size=600,
    max_tokens=400,
    ba_m=2,
    max_updates=8,
    warmup_updates=4,
    log_every=2,
    eval_every=3,
    save_every=4,
    num_beams=1,
    max_norm=1.0,
    cpu=True,
)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """One vocabulary and one encoded corpus for all runs of a test session."""
    return str(tmp_path_factory.mktemp("cache"))


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """Hundreds of pairs instead of thousands, short translations; accelerate's shared state ends with each test."""
    monkeypatch.setattr(
        prepare, "generate_corpus", lambda seed: generate_corpus(seed=seed, train=600, valid=40, test=12)
    )
    whole = result.translate
    monkeypatch.setattr(result, "translate", lambda *a, **k: whole(*a, max_new_tokens=12, **k))
    reset_accelerate()  # other tests leave theirs
    yield
    reset_accelerate()


def run(folder, cache, **changes):
    training.train(TINY.changed(output_dir=str(folder), cache_dir=cache, **changes))
    return folder


def weights(folder, update=8):
    return load_file(Path(folder) / "checkpoints" / f"update-{update:06d}" / "model.safetensors")


def rows(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(Path(folder) / "metrics.jsonl")]


class Killed(BaseException):
    """Ends a run as a kill does: nothing of the program gets to act on it."""


def killed_at(last, monkeypatch):
    whole = training.TrainStep.__call__

    def call(self, batches, *, update):
        if update == last:
            raise Killed
        return whole(self, batches, update=update)

    monkeypatch.setattr(training.TrainStep, "__call__", call)


def test_a_run_leaves_a_complete_folder(tmp_path, cache, capsys):
    folder = run(tmp_path / "run", cache, bleu_tokenize="char")
    assert {p.name for p in folder.iterdir()} >= {
        "config.json", "metrics.jsonl", "results.json", "checkpoints", "model", "curve.png"
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert config["ba_m"] == 2
    assert config["software"]["torch"] == version("torch")
    assert config["software"]["transformers"] == version("transformers")
    card = (folder / "model" / "README.md").read_text()
    assert "| mixed precision | no, 1 process(es) on cpu |" in card
    assert f"torch {version('torch')}" in card
    logged = read_metrics(folder / "metrics.jsonl")
    assert [row["update"] for row in logged] == [2, 3, 4, 6, 8]
    wanted = {"update", "loss", "lr", "grad_norm", "clip_fraction", "unique_samples", "seen_instances",
              "target_tokens", "seconds"}  # fmt: skip
    assert all(wanted <= row.keys() for row in logged)
    assert [row["update"] for row in logged if "valid_loss" in row] == [3, 6, 8]
    assert (folder / "curve.png").stat().st_size > 10_000
    results = json.loads((folder / "results.json").read_text())
    assert results["num_processes"] == 1
    assert results["tests"]["generated"]["signature"].startswith("nrefs:1|case:mixed|eff:no|tok:char")
    assert results["seconds"] > 0
    said, bars = capsys.readouterr()
    for row in logged:
        assert ("valid_loss" in row) == (f"update {row['update']}: valid_loss {row.get('valid_loss', 0):.4f}" in said)
    assert f"best validation: valid_loss {results['valid_loss']:.4f}, at update {results['best_update']}" in said
    assert "translating: 100%" in bars
    assert "tokens/s with copies" in bars
    assert f"test generated: BLEU {results['tests']['generated']['bleu']:.2f}" in said
    assert results["tests"]["generated"]["signature"] in said
    assert len(read_lines(folder / "hyp.generated.txt")) == 12


@pytest.mark.trap(36)
@pytest.mark.trap(59)
def test_the_result_is_of_the_best_checkpoint_and_names_the_search_that_ran(tmp_path, cache, monkeypatch, capsys):
    losses = iter([3.0, 2.0, 2.5])  # after updates 3, 6 and 8: it rises at the end
    monkeypatch.setattr(training, "validation_loss", lambda *a: next(losses))
    folder = run(tmp_path / "run", cache, num_beams=2, length_penalty=1.7)
    delivered, best, last = load_file(folder / "model" / "model.safetensors"), weights(folder, 6), weights(folder, 8)
    common = delivered.keys() & best.keys()
    assert "model.shared.weight" in common
    assert all(torch.equal(delivered[name], best[name]) for name in common)
    assert not torch.equal(last["model.shared.weight"], best["model.shared.weight"])
    test = json.loads((folder / "results.json").read_text())["tests"]["generated"]
    assert test["decoding"] == "beam 2, log-probability / L^1.7"
    line = f"{test['signature']}; {test['decoding']})"
    assert line in capsys.readouterr().out
    assert line in (folder / "model" / "README.md").read_text()
    settings = json.loads((folder / "model" / "generation_config.json").read_text())
    assert (settings["num_beams"], settings["length_penalty"]) == (2, 1.7)


def test_every_update_has_its_own_rate_and_the_adam_of_vaswani(tmp_path, cache, monkeypatch):
    whole, used = training.TrainStep.__call__, {}

    def call(self, batches, *, update):
        (group,) = self.optimizer.param_groups
        used[update] = group["lr"]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.98), 1e-9, 0)  # section 5.3
        return whole(self, batches, update=update)

    monkeypatch.setattr(training.TrainStep, "__call__", call)
    folder = run(tmp_path / "run", cache, max_updates=6, warmup_updates=3, log_every=1, lr_scale=0.5)
    want = {t: 0.5 * 16**-0.5 * min(t**-0.5, t * 3**-1.5) for t in range(1, 7)}  # equation 3
    assert used == pytest.approx(want)
    assert {row["update"]: row["lr"] for row in rows(folder)} == pytest.approx(want)


def test_every_option_of_training_reaches_the_update(tmp_path, cache, monkeypatch):
    met = []

    def call(self, batches, *, update):
        met.append((self, len(batches)))
        raise Killed

    monkeypatch.setattr(training.TrainStep, "__call__", call)
    changes = {
        "dropout": 0.11, "attention_dropout": 0.22, "activation_dropout": 0.33, "label_smoothing": 0.44,
        "max_norm": 5.5, "ba_m": 3, "copies_per_pass": 2, "reproducible_copies": True, "accumulation": 2,
        "gradient_checkpointing": True, "num_layers": 2, "num_heads": 4, "ffn_width": 40, "width": 24,
    }  # fmt: skip
    for seed in (7, 8):
        with pytest.raises(Killed):
            run(tmp_path / f"{seed}", cache, seed=seed, **changes)
    (step, num_batches), (other, _) = met
    assert (len(step.plan.copies), step.plan.copies_per_pass, step.copy_seed, step.max_norm) == (3, 2, 7, 5.5)
    assert (num_batches, step.model.label_smoothing, other.copy_seed) == (2, 0.44, 8)
    network = step.model.model
    for half in (network.model.encoder, network.model.decoder):
        assert (half.dropout, len(half.layers), half.gradient_checkpointing) == (0.11, 2, True)
        for layer in half.layers:
            assert (layer.dropout, layer.activation_dropout) == (0.11, 0.33)
            assert (layer.self_attn.dropout, layer.self_attn.num_heads) == (0.22, 4)
            assert layer.fc1.weight.shape == (40, 24)
    weights_of = [one.model.model.model.shared.weight for one in (step, other)]
    assert not torch.equal(*weights_of)


def test_the_validation_loss_is_one_sum_over_all_targets_without_dropout_or_smoothing(cache):
    accelerator, config = Accelerator(cpu=True), TINY.changed(cache_dir=cache, dropout=0.3).config
    corpus = training.load_corpus(config, accelerator)
    model = training.build(config, corpus, seed=0)
    with torch.no_grad():
        model.model.shared.weight.mul_(9)  # sentences cost more and less
    loss = TranslationLoss(model, 0.2).train()
    longest = int(corpus.valid_lengths.max())
    got = [training.validation_loss(accelerator, loss, corpus, max_tokens) for max_tokens in (longest, 300)]
    assert loss.training
    nats = targets = 0
    for pair in corpus.valid:
        ids, labels = torch.tensor([pair["input_ids"]]), torch.tensor([pair["labels"]])
        before = torch.cat([torch.tensor([[model.config.decoder_start_token_id]]), labels[:, :-1]], dim=1)
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, decoder_input_ids=before).logits[0].double()
        nats -= float(logits.log_softmax(-1).gather(1, labels.T).sum())
        targets += labels.numel()
    assert got == pytest.approx([nats / targets] * 2, rel=1e-6)


def test_the_length_ratio_drops_training_pairs_alone(cache):
    config = TINY.changed(cache_dir=cache).config
    every, few = (
        training.load_corpus(dataclasses.replace(config, max_length_ratio=ratio), Accelerator(cpu=True))
        for ratio in (None, 1.0)
    )
    assert 0 < len(few.train) < len(every.train)
    assert few.valid["labels"][:] == every.valid["labels"][:]


def test_every_test_sentence_that_stands_in_the_training_text_is_counted(cache, caplog):
    corpus = generate_corpus(train=600, valid=40, test=12)
    known, new = corpus["train"].source[:2], corpus["test"].source[:2]
    leaked = ParallelText([known[0], new[0], known[0], known[1], new[1]], ["a"] * 5)
    texts = prepare.Texts(corpus["train"], corpus["valid"], {"leaked": leaked, "clean": corpus["test"]}, "")
    with caplog.at_level("INFO"):
        prepare.prepare(lambda: texts, Accelerator(cpu=True), vocab_size=600, max_length=250, cache_dir=cache)
    said = [record.getMessage() for record in caplog.records if "in the training text too" in record.getMessage()]
    assert said == ["leaked text: 3 of 5 source sentences are in the training text too"]


@pytest.mark.trap(21)
def test_updates_rates_data_and_cadence_do_not_move_with_m(tmp_path, cache):
    one, three = (rows(run(tmp_path / f"m{m}", cache, ba_m=m)) for m in (1, 3))
    for a, b in zip(one, three, strict=True):
        assert (a["update"], a["lr"]) == (b["update"], b["lr"])
        assert a["unique_samples"] == b["unique_samples"] == a["seen_instances"]
        assert b["seen_instances"] == 3 * b["unique_samples"]
        assert b["target_tokens"] == 3 * a["target_tokens"]
        assert ("valid_loss" in a) == ("valid_loss" in b)


@pytest.mark.trap(24)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"reproducible_copies": True, "copies_per_pass": 1},
        {"accumulation": 2, "num_workers": 1},
        {"max_tokens": 6_000, "save_every": 2},  # a batch is most of an epoch: the resume lies behind an epoch's end
    ],
)
def test_a_killed_run_resumed_is_bitwise_the_undisturbed_one(changes, tmp_path, cache, monkeypatch):
    straight = run(tmp_path / "straight", cache, **changes)
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(Killed):
            run(tmp_path / "killed", cache, **changes)
    assert read_metrics(tmp_path / "killed" / "metrics.jsonl")[-1]["update"] == 6
    killed = run(tmp_path / "killed", cache, resume=True, **changes)
    want, got = weights(straight), weights(killed)
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert rows(straight) == rows(killed)
    last, again = (json.loads((f / "results.json").read_text()) for f in (straight, killed))
    assert last["tests"] == again["tests"]


def test_resuming_before_anything_was_saved_starts_over(tmp_path, cache, monkeypatch):
    with monkeypatch.context() as patch:
        killed_at(3, patch)
        with pytest.raises(Killed):
            run(tmp_path / "run", cache)
    resumed = run(tmp_path / "run", cache, resume=True)
    assert rows(resumed) == rows(run(tmp_path / "straight", cache))


@pytest.mark.parametrize("what", ["no checkpoints", "fewer updates", "no best"])
def test_a_finished_run_is_never_replaced_by_a_worse_one(what, tmp_path, cache, monkeypatch):
    losses = itertools.count(1.0)  # the first validation is the best
    monkeypatch.setattr(training, "validation_loss", lambda *_: next(losses))
    folder = run(tmp_path / "run", cache)
    results = (folder / "results.json").read_text()
    done = json.loads(results)["updates"]
    changes = {"max_updates": done}
    if what == "no checkpoints":
        shutil.rmtree(folder / "checkpoints")
        message = "holds results.json and model of a finished run, and no checkpoint to go on from"
    elif what == "fewer updates":
        changes["max_updates"] = done - 1
        message = f"has done {done} updates, more than --max-updates {done - 1}; raise it"
    else:
        shutil.rmtree(folder / "checkpoints" / f"update-{json.loads(results)['best_update']:06d}")
        message = "the best checkpoint, of update .*, is gone, and no update is left to find another"
    with pytest.raises(RunError, match=message):
        run(tmp_path / "run", cache, resume=True, **changes)
    assert (folder / "results.json").read_text() == results


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, cache, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        killed_at(7, patch)
        with pytest.raises(Killed):
            run(tmp_path / "run", cache, save_every=2)
    newest = tmp_path / "run" / "checkpoints" / "update-000006" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    run(tmp_path / "run", cache, save_every=2, resume=True)
    said = capsys.readouterr().out
    assert "update-000006 is damaged" in said
    assert "resumed at update 4" in said
    assert torch.equal(*(w["model.shared.weight"] for w in (
        weights(tmp_path / "run"), weights(run(tmp_path / "straight", cache, save_every=2))
    )))  # fmt: skip


def test_a_tracker_gets_all_options_and_the_folders_name(tmp_path, cache, monkeypatch):
    started = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *args: started.append(args))
    run(tmp_path / "my-run", cache, max_updates=1)
    ((project, config, more),) = started
    assert project == "translation"
    assert (config["ba_m"], config["width"], config["mixed_precision"]) == (2, TINY.config.width, "no")
    assert all(isinstance(value, (int, float, str, bool)) for value in config.values())
    assert more["wandb"]["name"] == "my-run"


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_all_files_of_a_run_follow_the_umask(umask, tmp_path, cache):
    before = os.umask(umask)
    try:
        folder = run(tmp_path / "run", cache, max_updates=2)
    finally:
        os.umask(before)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".json", ".pt", ".png"}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }


def test_a_resume_with_other_versions_goes_on_and_says_so(tmp_path, cache, capsys):
    run(tmp_path / "run", cache, max_updates=2)
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["software"]["torch"] = "2.0"
    file.write_text(json.dumps(config))
    run(tmp_path / "run", cache, max_updates=4, resume=True)
    assert f"other software (torch was 2.0, is {version('torch')})" in capsys.readouterr().out
    assert json.loads(file.read_text())["software"]["torch"] == version("torch")


def test_a_folder_that_holds_a_run_is_not_overwritten_and_another_configuration_is_named(tmp_path, cache):
    run(tmp_path / "run", cache)
    with pytest.raises(RunError, match="already holds a run; continue it with --resume"):
        run(tmp_path / "run", cache)
    with pytest.raises(RunError, match=r"ba_m was 2, is 3; dropout was 0.1, is 0.3"):
        run(tmp_path / "run", cache, ba_m=3, dropout=0.3, resume=True)


def test_a_loss_that_is_not_finite_stops_and_names_update_samples_and_checkpoint(tmp_path, cache, monkeypatch):
    whole, calls = training.summed_loss, itertools.count(1)

    def loss(model, rows):
        return whole(model, rows) * (float("nan") if next(calls) > 5 else 1.0)

    monkeypatch.setattr(training, "summed_loss", loss)
    with pytest.raises(NonFiniteError, match=r"update 6: loss nan.*samples \d+, \d+.*update-000004"):
        run(tmp_path / "run", cache, allow_identical_copies=True)  # the audit asks for the loss too
    assert all(torch.isfinite(x).all() for x in weights(tmp_path / "run", 4).values())


def test_an_accelerator_that_runs_ahead_names_the_update_that_failed_and_not_the_next(tmp_path, monkeypatch):
    """There a result is read one update later, so that nothing waits for the device."""
    ahead = Run(Accelerator(cpu=True), tmp_path / "run", RunOptions(), {}, group=CopyGroup(1), figures=training.FIGURES)
    model = torch.nn.Linear(2, 3)
    ahead.attach(model, torch.optim.SGD(model.parameters()))
    monkeypatch.setattr(type(ahead.accelerator), "device", torch.device("meta"))

    def outcome(loss):
        return UpdateResult(torch.tensor(loss), torch.ones(()), torch.tensor(5), torch.tensor(2), 1)

    ahead.record(1, outcome(1.0), [10, 11])
    ahead.record(2, outcome(float("inf")), [20, 21])
    with pytest.raises(NonFiniteError, match=r"update 2: loss inf.* samples 20, 21 of"):
        ahead.record(3, outcome(1.0), [30, 31])
    assert ahead.progress.unique_samples == 2  # of the first update alone


def launched(code, launcher, **environment):
    """What a script prints under a launcher, with only the stated OMP_NUM_THREADS."""
    kept = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS" and not k.startswith("ACCELERATE")}
    done = subprocess.run([*launcher, code], env={**kept, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.slow
@pytest.mark.trap(46)
def test_a_lone_cpu_run_uses_all_cores_unless_the_user_chose_a_number(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(
        "import json, os, torch\nfrom tasks.cli.machine import MachineOptions, start_accelerator\n"
        "machine = MachineOptions(cpu=True, num_threads=json.loads(os.environ.get('ASKED', 'null')))\n"
        "start_accelerator(machine, seed=0)\nprint(torch.get_num_threads())\n"
    )
    cores = len(os.sched_getaffinity(0))
    if cores == 1:
        pytest.skip("one core: all of them is what the launcher gives")
    # as the README has it: with --cpu the launcher would export the cores by itself
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", "1"]
    assert launched(script, accelerate) == cores
    assert launched(script, accelerate, ASKED="1") == 1  # --num-threads 1
    assert launched(script, [sys.executable]) == cores
    assert launched(script, [sys.executable], OMP_NUM_THREADS="1") == 1


@pytest.mark.slow
@pytest.mark.trap(61)
@pytest.mark.skipif(torch.cuda.is_available(), reason="ranks find each other on GPUs")
def test_ranks_that_find_themselves_alone_are_refused(tmp_path):
    script = tmp_path / "alone.py"
    script.write_text(
        "from tasks.cli.errors import explained\nfrom tasks.cli.machine import MachineOptions, start_accelerator\n"
        "with explained():\n    start_accelerator(MachineOptions(), seed=0)\n"
    )
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)]
    kept = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE")}
    done = subprocess.run(ranks, capture_output=True, text=True, check=False, env=kept)
    assert done.returncode != 0
    assert "WORLD_SIZE=2 says that so many processes work together, and each finds itself alone" in done.stderr


@pytest.mark.trap(62)
def test_the_precision_that_accelerate_was_configured_to_is_recorded_and_compared(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    training.train(TINY.changed(output_dir=str(tmp_path / "run"), max_updates=4))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["mixed_precision"] == "bf16"
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    with pytest.raises(RunError, match="mixed_precision was 'bf16', is 'no'"):
        training.train(TINY.changed(output_dir=str(tmp_path / "run"), max_updates=8, resume=True))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory by rules of its own")
def test_a_run_on_a_processor_keeps_the_memory_of_large_tensors(monkeypatch):
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    start_accelerator(MachineOptions(cpu=True), seed=0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.ones(2**24)  # 64 MiB
    pages = 2**26 // resource.getpagesize()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20 * pages  # once each without it


TWO_RANKS = """
import json
import sys
import torch
from distributed import report
from tasks.translation import prepare, result
from tasks.translation import train as training
from tasks.text.generated.corpus import generate_corpus
from tasks.text.parallel import read_lines
from test_run import TINY

folder, cache, changes = sys.argv[1:]
changes = json.loads(changes)
prepare.generate_corpus = lambda seed: generate_corpus(seed=seed, train=600, valid=40, test=12)
stop_at = changes.pop("stop_at", None)
whole = training.TrainStep.__call__
masks = []

def call(self, batches, *, update):
    if update == stop_at:
        report(masks)
        sys.exit(0)
    if not masks:
        with torch.random.fork_rng():  # looked at, not used up
            masks.append(torch.nn.functional.dropout(torch.ones(50), 0.5).tolist())
    return whole(self, batches, update=update)

training.TrainStep.__call__ = call
training.train(TINY.changed(cpu=False, output_dir=folder, cache_dir=cache, **changes))
report(masks)
"""


def two_ranks(folder, cache, **changes):
    return run_ranks(TWO_RANKS, 2, args=[str(folder), cache, json.dumps(changes)])


@pytest.mark.trap(42)
@pytest.mark.trap(43)
def test_two_ranks_do_the_run_of_one_rank_that_accumulates_two_batches(tmp_path, cache):
    two_ranks(tmp_path / "two", cache, reproducible_copies=True)
    one = run(tmp_path / "one", cache, accumulation=2, reproducible_copies=True)
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one")]
    assert [r["num_processes"] for r in results] == [2, 1]
    for a, b in zip(rows(tmp_path / "two"), rows(one), strict=True):
        assert (a["update"], a["lr"], a["unique_samples"]) == (b["update"], b["lr"], b["unique_samples"])
        assert a["target_tokens"] == b["target_tokens"]
        assert abs(a["loss"] - b["loss"]) < 1e-4
        assert abs(a.get("valid_loss", 0) - b.get("valid_loss", 0)) < 1e-3
    two, alone = weights(tmp_path / "two"), weights(one)
    for name in alone:
        # the gradient of a key's bias is zero but for rounding, which Adam blows up to its full step
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(two[name], alone[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.trap(24)
def test_two_ranks_draw_their_own_masks_and_resume_bitwise(tmp_path, cache):
    first, second = two_ranks(tmp_path / "straight", cache)
    assert first != second  # without streams too, a rank's copies are under masks of its own
    two_ranks(tmp_path / "killed", cache, stop_at=7)
    two_ranks(tmp_path / "killed", cache, resume=True)
    straight, killed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    assert rows(tmp_path / "straight") == rows(tmp_path / "killed")


def test_copies_between_which_nothing_is_random_are_refused_before_training_and_allowed_by_option(tmp_path, cache):
    still = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    with pytest.raises(
        UserError, match=r"^identical copies are refused; give --dropout 0.1, .*--allow-identical-copies"
    ) as refused:
        run(tmp_path / "run", cache, **still)
    table = refused.value.details.split("\n")
    assert sum("inactive (p=0)" in line for line in table) == 9
    assert table[-1].startswith("The copies are identical")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run(tmp_path / "run", cache, allow_identical_copies=True, **still)
    one, same = rows(run(tmp_path / "one", cache, ba_m=1, **still)), rows(tmp_path / "run")
    assert [row["loss"] for row in same] == pytest.approx([row["loss"] for row in one], rel=1e-5)


def test_a_processor_that_would_emulate_bfloat16_is_said_to(tmp_path, cache, capsys, monkeypatch):
    for capability, is_said in (("AVX2", True), ("AVX512", False)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        monkeypatch.setattr("platform.machine", lambda: "x86_64")
        run(tmp_path / capability, cache, mixed_precision="bf16", max_updates=1)
        assert ("bf16 is emulated" in capsys.readouterr().out) == is_said


def test_the_audit_moves_no_generator(tmp_path, cache):
    audited = run(tmp_path / "audited", cache)
    run(tmp_path / "not", cache, allow_identical_copies=True)
    assert all(torch.equal(x, weights(tmp_path / "not")[name]) for name, x in weights(audited).items())
