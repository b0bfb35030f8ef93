"""A run of scripts/train_ptb.py: its laws, its resume, its ranks, and what it leaves behind."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoTokenizer

from distributed import run_ranks
from seqba import BatchAugmentationArguments
from tasks.cli.errors import DataError, UserError
from tasks.cli.machine import MachineOptions
from tasks.language_modelling import AwdLstmConfig, AwdLstmForCausalLM, prepare
from tasks.language_modelling import train as language
from tasks.language_modelling.config import LanguageModelConfig, parse_config, run_folder
from tasks.language_modelling.loss import LanguageModelLoss
from tasks.language_modelling.presets import PRESETS
from tasks.language_modelling.text import generated_splits
from tasks.language_modelling.vocabulary import encode_lines
from tasks.run.log import read_metrics
from tasks.run.options import RunOptions

TINY = parse_config([]).changed(
    embedding_size=12,
    hidden_size=16,
    num_layers=2,
    bptt=12,
    batch_size=3,
    learning_rate=5.0,
    ba_m=2,
    max_updates=12,
    log_every=1,
    eval_every=3,
    save_every=4,
    nonmono=1,
    cpu=True,
)
STILL = {
    "input_dropout": 0.0, "hidden_dropout": 0.0, "output_dropout": 0.0, "embedding_dropout": 0.0, "weight_dropout": 0.0,
    "allow_identical_copies": True,
}  # fmt: skip


_WHOLE = generated_splits(0)["train"][:40]
SPLITS = {"train": _WHOLE, "valid": _WHOLE[::3], "test": _WHOLE[1::4]}  # an epoch of TINY has some ten updates


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    monkeypatch.setattr(prepare, "generated_splits", lambda seed: SPLITS)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(folder, **changes):
    language.train(TINY.changed(output_dir=str(folder), **changes))
    return folder


def checkpoint(folder, update=12):
    return Path(folder) / "checkpoints" / f"update-{update:06d}"


def weights(folder, update=12):
    return load_file(checkpoint(folder, update) / "model.safetensors")


def rows(folder):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(Path(folder) / "metrics.jsonl")]


def assert_same_run(one, other):
    """Bitwise: log, weights, averages, hidden states and generators of the last checkpoint, and the result."""
    assert rows(one) == rows(other)
    for name in ("model.safetensors", "tensors.safetensors"):
        assert (checkpoint(one) / name).read_bytes() == (checkpoint(other) / name).read_bytes(), name
    counters = [json.loads((checkpoint(folder) / "counters.json").read_text()) for folder in (one, other)]
    for part in counters:
        del part["progress"]["seconds"]
    assert counters[0] == counters[1]
    first, second = (torch.load(checkpoint(folder) / "optimizer.pt") for folder in (one, other))
    assert first["param_groups"] == second["param_groups"]
    for index, state in first["state"].items():
        assert all(torch.equal(torch.as_tensor(x), second["state"][index][name]) for name, x in state.items())
    results = [json.loads((Path(folder) / "results.json").read_text()) for folder in (one, other)]
    assert results[0]["test_loss"] == results[1]["test_loss"]


class Killed(BaseException):
    """Ends a run as a kill does: nothing of the program gets to act on it."""


def kill_at(last, monkeypatch):
    whole = language.TrainStep.__call__

    def call(self, batches, *, update):
        if update == last:
            raise Killed
        return whole(self, batches, update=update)

    monkeypatch.setattr(language.TrainStep, "__call__", call)


# ---- the run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that came to averaging."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "generated_splits", lambda seed: SPLITS)
        folder = run(tmp_path_factory.mktemp("finished") / "run", **AVERAGING)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


AVERAGING = {"learning_rate": 20.0, "eval_every": 1}


def test_a_run_leaves_a_complete_folder(finished):
    assert {path.name for path in finished.glob("[!.]*")} == {
        "config.json", "metrics.jsonl", "results.json", "checkpoints", "model", "curve.png"
    }  # fmt: skip
    assert (finished / "curve.png").stat().st_size > 10_000
    results = json.loads((finished / "results.json").read_text())
    assert results["test_perplexity"] == pytest.approx(math.exp(results["test_loss"]))
    assert results["averages"]
    card = (finished / "model" / "README.md").read_text()
    for part in (f"perplexity {results['test_perplexity']:.2f}", "<eos> counted", "M | 2 (copies per pass auto",
                 "import tasks.language_modelling", "averaged by NT-ASGD", "per_copy"):  # fmt: skip
        assert part in card, part


@pytest.mark.trap(32)
def test_a_rate_is_that_of_its_window_and_the_share_of_clipped_updates_is_logged(finished):
    logged = rows(finished)
    assert [row["update"] for row in logged] == list(range(1, 13))
    tokens = [b - a for a, b in itertools.pairwise([0, *(row["target_tokens"] for row in logged)])]
    lengths = [count / (2 * 3) for count in tokens]  # M copies of B streams
    assert len(set(lengths)) > 3
    assert [row["lr"] for row in logged] == pytest.approx([20.0 * length / 12 for length in lengths])
    assert all(row["clip_fraction"] == float(row["grad_norm"] > 0.25) for row in logged)
    assert {row["clip_fraction"] for row in logged} == {0.0, 1.0}


@pytest.mark.trap(32)
def test_averaging_begins_by_the_validations_so_far_at_the_same_update_for_every_m(tmp_path):
    found = {}
    for m in (1, 3):
        logged = rows(run(tmp_path / f"m{m}", **AVERAGING, **STILL, ba_m=m))
        losses = [row["valid_loss"] for row in logged]
        fired = [t > 1 and losses[t] > min(losses[: t - 1]) for t in range(12)]
        assert True in fired[2:9]
        begun = [any(fired[: t + 1]) for t in range(12)]
        assert [row["averages"] for row in logged] == begun
        found[m] = losses
    assert found[1] == pytest.approx(found[3], rel=1e-4)


@pytest.mark.trap(21)
def test_windows_rates_and_cadence_do_not_move_with_m_nor_with_its_plan(tmp_path):
    one, three, apart = (
        rows(run(tmp_path / name, **changes))
        for name, changes in {"1": {"ba_m": 1}, "3": {"ba_m": 3}, "apart": {"ba_m": 3, "copies_per_pass": 1}}.items()
    )
    for a, b, c in zip(one, three, apart, strict=True):
        assert (a["update"], a["lr"], a["unique_samples"]) == (b["update"], b["lr"], b["unique_samples"])
        assert b["target_tokens"] == c["target_tokens"] == 3 * a["target_tokens"]
        assert b["seen_instances"] == 3 * b["unique_samples"]
        assert ("valid_loss" in a) == ("valid_loss" in b)


@pytest.mark.trap(10)
def test_without_dropout_a_run_does_not_depend_on_m_nor_on_its_plan(tmp_path):
    one = run(tmp_path / "one", ba_m=1, **STILL)
    for m, plan in ((4, "auto"), (4, 3), (2, 1)):
        other = run(tmp_path / f"{m}-{plan}", ba_m=m, copies_per_pass=plan, **STILL)
        for name, weight in weights(one).items():
            torch.testing.assert_close(weights(other)[name], weight, rtol=1e-3, atol=1e-5, msg=name)
        assert [row["loss"] for row in rows(other)] == pytest.approx([row["loss"] for row in rows(one)], rel=1e-4)


@pytest.mark.trap(1)
@pytest.mark.trap(2)
@pytest.mark.parametrize("plan", [1, 2])
def test_reproducible_copies_are_the_same_in_every_plan(plan, tmp_path, monkeypatch):
    fused = run(tmp_path / "fused", ba_m=3, reproducible_copies=True)
    whole, seen = LanguageModelLoss.forward, set()

    def spy(self, batch, state=None):
        seen.add(len(batch["input_ids"]) if self.training else None)
        return whole(self, batch, state)

    monkeypatch.setattr(LanguageModelLoss, "forward", spy)
    apart = run(tmp_path / "apart", ba_m=3, reproducible_copies=True, copies_per_pass=plan)
    assert {3, 3 * plan} <= seen
    assert 3 * 3 not in seen
    monkeypatch.undo()
    monkeypatch.setattr(prepare, "generated_splits", lambda seed: SPLITS)
    for name, weight in weights(fused).items():
        torch.testing.assert_close(weights(apart)[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    assert not torch.equal(weights(run(tmp_path / "other", ba_m=3))[name], weight)


@pytest.mark.trap(5)
def test_each_copy_goes_on_from_its_own_state_which_is_detached_and_zero_at_an_epochs_begin(tmp_path, monkeypatch):
    whole, calls = LanguageModelLoss.forward, []

    def spy(self, batch, state=None):
        loss, after = whole(self, batch, state)
        if self.training and torch.is_grad_enabled() and state is not None:
            calls.append((batch["input_ids"], state, after))
        return loss, after

    monkeypatch.setattr(LanguageModelLoss, "forward", spy)
    run(tmp_path / "run", max_updates=24)
    assert len(calls) == 24
    first = calls[0][0][:, 0]
    epochs = 0
    for (ids, state, _), before in zip(calls, [None, *calls], strict=False):
        assert not any(x.requires_grad for pair in state for x in pair)
        if torch.equal(ids[:, 0], first):
            epochs += 1
            assert not any(x.any() for pair in state for x in pair)
            continue
        for pair, kept in zip(state, before[2], strict=True):
            assert all(torch.equal(x, y) for x, y in zip(pair, kept, strict=True))
        assert not torch.equal(state[0][0][:, :3], state[0][0][:, 3:])  # the copies have come to states of their own
    assert 2 <= epochs <= 4


def test_an_attempt_that_runs_out_of_memory_leaves_a_run_as_it_was(tmp_path, monkeypatch):
    options = {"ba_m": 4, "reproducible_copies": True, "max_updates": 4, "eval_every": 4, "accumulation": 2}
    straight = run(tmp_path / "straight", copies_per_pass=2, **options)
    whole, fused = LanguageModelLoss.forward, []

    def short_of_memory(self, batch, state=None):
        loss, after = whole(self, batch, state)
        if self.training and torch.is_grad_enabled() and len(batch["input_ids"]) == 12:
            fused.append(state)
            if len(fused) == 4:  # the second batch of the second update, when the first has kept its state
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")
        return loss, after

    monkeypatch.setattr(LanguageModelLoss, "forward", short_of_memory)
    tried = run(tmp_path / "tried", **options)
    assert len(fused) == 4
    for name, weight in weights(straight, 4).items():
        torch.testing.assert_close(weights(tried, 4)[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    want, got = (load_file(checkpoint(folder, 4) / "tensors.safetensors") for folder in (straight, tried))
    assert want.keys() == got.keys()
    for name, state in want.items():
        torch.testing.assert_close(got[name], state, rtol=1e-4, atol=1e-6, msg=name)


# ---- resuming


@pytest.mark.trap(24)
@pytest.mark.trap(5)
@pytest.mark.parametrize(
    ("killed", "changes"),
    [
        (7, {}),  # goes on from update 4, in the midst of an epoch
        (12, {"save_every": 5, "bptt": 24}),  # from update 10, in a later epoch
        (6, AVERAGING),  # from update 4, before averaging begins
        (11, AVERAGING),  # from update 8, behind that
        (7, {"reproducible_copies": True, "copies_per_pass": 1}),
        (6, {"accumulation": 2, "num_workers": 1, "save_every": 5}),
    ],
)
def test_a_killed_run_resumed_is_bitwise_the_undisturbed_one(killed, changes, tmp_path):
    straight = run(tmp_path / "straight", **changes)
    with pytest.MonkeyPatch.context() as patch:
        kill_at(killed, patch)
        with pytest.raises(Killed):
            run(tmp_path / "killed", **changes)
    assert_same_run(straight, run(tmp_path / "killed", resume=True, **changes))


def test_a_run_is_not_resumed_on_another_text_or_with_other_windows(tmp_path, monkeypatch):
    run(tmp_path / "run", max_updates=4)
    with pytest.raises(UserError, match="bptt"):
        run(tmp_path / "run", max_updates=8, resume=True, bptt=20)
    monkeypatch.setattr(prepare, "generated_splits", lambda seed: SPLITS | {"train": SPLITS["train"][::-1]})
    with pytest.raises(UserError, match="the data is not what the run was begun with"):
        run(tmp_path / "run", max_updates=8, resume=True)


def test_every_option_of_training_reaches_it(tmp_path):
    changes = [
        {}, {"alpha": 0.0}, {"beta": 0.0}, {"weight_decay": 0.1}, {"max_norm": 0.01}, {"learning_rate": 4.0},
        {"bptt": 9}, {"seed": 1}, {"ba_m": 3}, {"mask_scope": "shared"}, {"embedding_size": 10}, {"hidden_size": 10},
        {"num_layers": 1}, {"batch_size": 4}, {"accumulation": 2},
        *({name: 0.6} for name in STILL if "dropout" in name),
    ]  # fmt: skip
    found = {}
    for i, change in enumerate(changes):
        folder = run(tmp_path / str(i), **{"max_updates": 2, "eval_every": 2} | change)
        found[(checkpoint(folder, 2) / "model.safetensors").read_bytes()] = change
    assert len(found) == len(changes), [change for change in changes if change not in found.values()]


# ---- ranks

TWO_RANKS = """
import json
import sys
import torch
from distributed import report
from tasks.language_modelling import prepare
from tasks.language_modelling import train as language
import test_language_modelling as tests

folder, changes = sys.argv[1:]
changes = json.loads(changes)
prepare.generated_splits = lambda seed: tests.SPLITS
stop_at = changes.pop("stop_at", None)
whole = language.TrainStep.__call__
ranks = []

def call(self, batches, *, update):
    if not ranks:
        with torch.random.fork_rng():  # looked at, not used up
            ranks[:] = [self.accelerator.num_processes, torch.rand(()).item()]
    if update == stop_at:
        report(ranks)
        sys.exit(0)
    return whole(self, batches, update=update)

language.TrainStep.__call__ = call
language.train(tests.TINY.changed(cpu=False, output_dir=folder, **changes))
report(ranks)
"""


def two_ranks(folder, **changes):
    (count, first), (other, second) = run_ranks(TWO_RANKS, 2, args=[str(folder), json.dumps(changes)])
    assert count == other == 2
    assert first != second  # the masks of a rank are its own
    return folder


@pytest.mark.trap(43)
def test_two_ranks_do_the_run_of_one_rank_that_accumulates_two_batches(tmp_path):
    two = two_ranks(tmp_path / "two", reproducible_copies=True)
    one = run(tmp_path / "one", accumulation=2, reproducible_copies=True)
    for a, b in zip(rows(two), rows(one), strict=True):
        assert {name: a[name] for name in ("update", "lr", "averages", "unique_samples", "target_tokens")} == {
            name: b[name] for name in ("update", "lr", "averages", "unique_samples", "target_tokens")
        }
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a.get("valid_loss", 0) == pytest.approx(b.get("valid_loss", 0), rel=1e-4)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(two)[name], weight, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.trap(24)
def test_two_ranks_resume_bitwise(tmp_path):
    straight = two_ranks(tmp_path / "straight")
    two_ranks(tmp_path / "killed", stop_at=7)
    assert_same_run(straight, two_ranks(tmp_path / "killed", resume=True))


# ---- evaluation


@pytest.mark.parametrize("num_streams", [1, 3, 7])
@pytest.mark.parametrize("tokens_a_pass", [8, 4_096])
def test_every_token_is_scored_once_as_transformers_scores_a_stream(num_streams, tokens_a_pass, monkeypatch):
    monkeypatch.setattr(language, "_EVALUATED", tokens_a_pass)
    model = AwdLstmForCausalLM(
        AwdLstmConfig(vocab_size=20, embedding_size=6, hidden_size=8, initializer_range=2.0, eos_token_id=0)
    )
    ids = np.random.default_rng(0).integers(len(model.lm_head.weight), size=100).astype(np.int32)
    loss_model = LanguageModelLoss(model, alpha=2.0, beta=1.0).train()
    found = language.evaluate(Accelerator(cpu=True), loss_model, ids, num_streams, "valid")
    assert loss_model.training
    model.eval().requires_grad_(False)
    width, nats = math.ceil(100 / num_streams), 0.0
    for start in range(0, 100, width):
        before = model.config.eos_token_id if start == 0 else ids[start - 1]
        stream = torch.tensor([[before, *ids[start : start + width].tolist()]])
        nats += float(model(stream, labels=stream).loss) * (stream.shape[1] - 1)
    assert found["valid_loss"] == pytest.approx(nats / 100, rel=1e-5)
    assert found["valid_perplexity"] == pytest.approx(math.exp(nats / 100), rel=1e-4)


# ---- the model folder

FRESH = """
import json, sys
import tasks.language_modelling
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))
batch = tokenizer([sys.argv[2]], return_tensors="pt", return_token_type_ids=False)
print(json.dumps(model.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()))
"""


def test_the_model_folder_holds_the_averages_of_the_best_checkpoint_and_loads_in_a_fresh_process(finished):
    logged = rows(finished)
    best = min((row for row in logged if "valid_loss" in row), key=lambda row: row["valid_loss"])["update"]
    results = json.loads((finished / "results.json").read_text())
    assert results["best_update"] == best
    model = AwdLstmForCausalLM.from_pretrained(finished / "model")
    assert model.config.mask_scope == "per_copy"
    kept = torch.load(checkpoint(finished, best) / "optimizer.pt")["state"]
    averages = [state["ax"] for _, state in sorted(kept.items())]
    assert all(torch.equal(x, y) for x, y in zip(averages, model.parameters(), strict=True))
    saved = weights(finished, best)
    assert not torch.equal(saved["model.embedding.weight"], model.model.embedding.weight)
    tokenizer = AutoTokenizer.from_pretrained(finished / "model")
    for split, streams in (("valid", TINY.config.valid_batch_size), ("test", 1)):
        ids = encode_lines(SPLITS[split], tokenizer, split)
        found = language.evaluate(Accelerator(cpu=True), LanguageModelLoss(model), ids, streams, split)
        assert found[f"{split}_loss"] == pytest.approx(results[f"{split}_loss"], rel=1e-6)
    prompt = SPLITS["test"][0]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(finished / "model"), prompt], capture_output=True, text=True, check=True
    )
    batch = tokenizer([prompt], return_tensors="pt", return_token_type_ids=False)
    want = model.eval().generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_the_result_is_the_best_checkpoint_also_where_it_is_not_the_last(tmp_path):
    folder = run(tmp_path / "run", learning_rate=40.0, eval_every=1, max_updates=6)
    results = json.loads((folder / "results.json").read_text())
    assert (results["best_update"], results["averages"]) == (2, False)
    model = AwdLstmForCausalLM.from_pretrained(folder / "model")
    for name, weight in weights(folder, 2).items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


# ---- what is refused


@pytest.mark.trap(34)
def test_identical_copies_are_refused_and_those_that_only_a_shared_mask_changes_are_named(tmp_path):
    alone = STILL | {"allow_identical_copies": False, "max_updates": 1}
    with pytest.raises(UserError, match=r"identical copies are refused; .*--output-dropout"):
        run(tmp_path / "still", **alone)
    assert not (tmp_path / "still" / "metrics.jsonl").exists()
    alone["weight_dropout"] = 0.5
    with pytest.warns(UserWarning, match=r"every random draw is shared by the copies of a pass \(weight dropout"):
        run(tmp_path / "shared", mask_scope="shared", **alone)
    run(tmp_path / "per_copy", mask_scope="per_copy", **alone)


@pytest.mark.parametrize(
    ("changes", "text", "message"),
    [
        ({"batch_size": 300}, {}, r"has 394 tokens, too few for 300 streams of at least 2 \(--batch-size 300"),
        ({}, {split: ["a"] for split in SPLITS}, r"has 2 tokens, too few for 3 streams"),
        ({}, {"valid": ["a zebra"]}, r"valid, line 1: '\w+' is not among the \d+ words"),
        ({"vocab_size": 2}, {}, "--vocab-size must be at least 3, got 2"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused_before_training(changes, text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "generated_splits", lambda seed: SPLITS | text)
    with pytest.raises(UserError, match=message):
        run(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_folder_of_files_is_trained_on_and_a_missing_split_is_named(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid"):
        (folder / f"ptb.{split}.txt").write_text("".join(f"{line}\r\n" for line in SPLITS[split]), newline="")
    with pytest.raises(DataError, match="has no split 'test': looked for"):
        run(tmp_path / "run", data=str(folder))
    (folder / "ptb.test.txt").write_text("".join(f"{line}\n" for line in SPLITS["test"]))
    read = run(tmp_path / "run", data=str(folder), max_updates=3)
    assert rows(read) == rows(run(tmp_path / "generated", max_updates=3))


# ---- options

OPTIONS = [
    option
    for part in (LanguageModelConfig, BatchAugmentationArguments, RunOptions, MachineOptions)
    for option in dataclasses.fields(part)
]


def test_every_option_has_help_and_every_preset_names_options():
    for option in OPTIONS:
        assert len(option.metadata["help"]) > 10, option.name
    assert len({option.name for option in OPTIONS}) == len(OPTIONS)
    for name, values in PRESETS.items():
        assert values.keys() <= {option.name for option in OPTIONS}
        parse_config(["--preset", name, "--data", "x"])


def test_the_paper_s_preset_is_the_published_recipe():
    options = parse_config(["--preset", "awd-lstm-ptb", "--data", "ptb", "--ba-m", "10"])
    config = options.config
    assert (config.learning_rate, config.bptt, config.batch_size, config.weight_decay) == (30.0, 70, 20, 1.2e-6)
    assert (config.alpha, config.beta, config.nonmono, options.run.max_norm) == (2.0, 1.0, 5, 0.25)
    corpus = prepare.load_corpus(None)
    Accelerator(cpu=True)  # its state is what the masks are seeded by
    model = language.build(config, corpus, 0)
    assert model.num_parameters() == 24_221_600 - 401 * (10_000 - len(corpus.tokenizer))
    own = {"vocab_size", "bos_token_id", "eos_token_id"}  # of the text; all else is the configuration's default
    default, made = AwdLstmConfig().to_dict(), model.config.to_dict()
    assert {name for name, value in default.items() if made[name] != value} <= own


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ba-m", "0"], "^--ba-m must be a whole number of at least 1, got 0"),
        (["--weight-dropout", "1"], r"--weight-dropout is a probability, from 0 to below 1, got 1\.0"),
        (["--mask-scope", "each"], "--mask-scope must be one of shared, per_copy|per_copy, shared, got each"),
        (["--learning-rate", "0"], "--learning-rate must be above 0 and finite, got 0"),
        (["--alpha", "nan"], "--alpha must be at least 0 and finite, got nan"),
        (["--bptt", "0"], "--bptt must be at least 1, got 0"),
        (["--preset", "nothing"], "--preset must be one of generated, awd-lstm-ptb, .*, got nothing"),
        (["--preset", "awd-lstm-wt2"], r"--preset awd-lstm-wt2 needs --data, or \$SEQBA_DATA .* wikitext2/"),
        (["--dropout", "0.1"], "unknown option --dropout 0.1"),
    ],
)
def test_a_bad_option_is_named_with_its_limit(argv, message, monkeypatch):
    monkeypatch.delenv("SEQBA_DATA", raising=False)
    with pytest.raises(UserError, match=message):
        parse_config(argv)


def test_a_preset_reads_its_text_under_the_data_folder_and_the_run_folder_says_text_and_m(monkeypatch):
    monkeypatch.setenv("SEQBA_DATA", "data")
    options = parse_config(["--preset", "awd-lstm-wt2", "--ba-m", "4", "--seed", "3"])
    assert options.config.data == str(Path("data/wikitext2"))
    assert run_folder(options) == "runs/language-modelling-wikitext2-m4-seed3"
    assert run_folder(parse_config(["--data", "a/b:c"])) == "runs/language-modelling-b-c-m1-seed0"
