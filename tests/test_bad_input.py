"""Bad input, end to end from the command line: one clear line, exit status 1, and nothing lost."""

from __future__ import annotations

import errno
import gzip
import lzma
import os
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest

from bad_input import OPTIONS, SCRIPTS, call, contents, write_text
from tasks.cli.errors import RunError, UserError, make_folder, writing
from tasks.models.transformer import build_model
from tasks.translation import prepare
from tasks.translation import train as training

TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb")


@dataclass(frozen=True)
class Case:
    """A command line, what the disk and the environment hold, and what the error must say; {here} is a new folder."""

    name: str
    argv: str
    says: tuple[str, ...]
    files: dict[str, bytes] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = tuple(OPTIONS)


def own(name: str, *, source: bytes, target: bytes = b"a\nb\n") -> dict[str, bytes]:
    return {f"{name}.en": source, f"{name}.de": target}


GOOD = b"".join(b"word %d\n" % n for n in range(99))

OPTION_CASES = [
    Case("no copies", "--ba-m 0", ("--ba-m must be a whole number of at least 1, got 0",)),
    Case("copies in words", "--ba-m two", ("--ba-m", "invalid int value: 'two'", "--help")),
    Case("pass over M", "--copies-per-pass 3", ("--copies-per-pass", "from 1 to --ba-m 2", "got 3")),
    Case("too many threads", "--num-threads 1000000", ("--num-threads must be at most", "got 1000000")),
    Case("too large a seed", "--seed 4294967296", ("--seed must be at most 4294901760, got 4294967296",)),
    Case("unknown option", "--bam 4", ("unknown option --bam 4", "--help")),
    Case("option without value", "--max-updates", ("--max-updates", "expected one argument")),
    Case("unknown preset", "--preset big", ("--preset must be one of generated, transformer-base", "got big")),
    Case("width", "--width 30 --num-heads 4", ("--width must be a multiple of 2 * --num-heads = 8, got 30",)),
    Case("probability", "--dropout 1.5", ("--dropout is a probability, from 0 to below 1, got 1.5",)),
    Case("probability nan", "--attention-dropout nan", ("--attention-dropout is a probability", "got nan")),
    Case("length penalty", "--length-penalty nan", ("--length-penalty must be finite, got nan",)),
    Case("no updates", "--max-updates 0", ("--max-updates must be at least 1, got 0",)),
    Case("unknown precision", "--mixed-precision fp9", ("--mixed-precision must be one of no, bf16, fp16, got fp9",)),
    Case("unknown tracker", "--report-to logbook", ("--report-to must be one of", "tensorboard", "got logbook")),
]

MACHINE_CASES = [
    Case("fp16 on a processor", "--mixed-precision fp16", ("fp16 needs an accelerator", "is on cpu", "bf16 or no")),
    Case(
        "fp16 configured",
        "",
        ("fp16 needs an accelerator", "is on cpu", "bf16 or no"),
        environment={"ACCELERATE_MIXED_PRECISION": "fp16"},
    ),
    *(
        Case(
            f"{device} where it is not",
            "",
            (f"the device {device} cannot be used here", f"ACCELERATE_TORCH_DEVICE={device} asks for it", "unset"),
            environment={"ACCELERATE_TORCH_DEVICE": device},
            options=tuple(option for option in OPTIONS if option != "--cpu"),
        )
        for device in ("cuda:99", "xpu", "gpu")
    ),
    Case(
        "cpu and another device",
        "",
        ("--cpu contradicts ACCELERATE_TORCH_DEVICE=meta", "unset the variable"),
        environment={"ACCELERATE_TORCH_DEVICE": "meta"},
    ),
]

FOLDER_CASES = [
    Case("run folder is a file", "--output-dir {here}/x", ("cannot write", "x (File exists)", "another --output-dir"),
         {"x": b""}),
    Case("run folder below a file", "--output-dir {here}/x/y", ("x/y (Not a directory)", "another --output-dir"),
         {"x": b""}),
    Case("cache is a file", "--cache-dir {here}/x", ("cannot write", "x (File exists)", "another --cache-dir"),
         {"x": b""}),
]  # fmt: skip

TEXT_CASES = [
    Case("different lengths", "--train-prefix {here}/x",
         ("x.en has 3 lines", "x.de has 2", "line n of one must translate line n of the other"),
         own("x", source=b"a\nb\nc\n")),
    Case("not UTF-8", "--train-prefix {here}/x", ("x.en, line 2: not valid UTF-8 (invalid start byte)", "convert"),
         own("x", source=b"a\n\xff\n")),
    Case("validation text not UTF-8", "--valid-prefix {here}/x", ("x.de, line 1: not valid UTF-8",),
         own("x", source=b"a\nb\n", target="ä\nb\n".encode("latin-1"))),
    Case("test text not UTF-8", "--test-prefix {text}/test {here}/x", ("x.en, line 2: not valid UTF-8",),
         own("x", source=b"a\n\xff\n")),
    Case("empty", "--train-prefix {here}/x", ("x.en is empty", "a sentence a line"), own("x", source=b"")),
    Case("all blank", "--train-prefix {here}/x",
         ("training text from", "no pair is left of 2: dropped 2 empty", "a pair needs both sides"),
         own("x", source=b"\n \n")),
    Case("all too long", "--max-length 2", ("training text: no pair is left of 300: dropped 300 too_long",
                                            "raise --max-length 2 (in pieces)")),
    Case("all uneven", "--train-prefix {here}/x --max-length-ratio 1.5 --vocab-size 274",
         ("no pair is left of 99: dropped 99 length_ratio", "--max-length-ratio 1.5"),
         own("x", source=GOOD, target=b"w" + b" w" * 40 + b"\n" + (b"w" + b" w" * 40 + b"\n") * 98)),
    Case("no such language", "--target-lang fr", ("no file for", "train.fr", "this prefix has de, en")),
    Case("one language twice", "--target-lang en", ("both 'en'", "--source-lang or --target-lang")),
    Case("no such prefix", "--train-prefix {here}/trian", ("no file for", "trian.en.gz", "no language at all")),
    Case("no such folder", "--valid-prefix {here}/none/x", ("there is no folder", "none")),
    Case("a folder for a file", "--train-prefix {here}/x", ("x.en is a folder", "must be a file"),
         {"x.en/y": b"", "x.de": b"a\n"}),
    Case("cut gz", "--train-prefix {here}/x", ("cannot read", "x.en.gz", "end-of-stream", "again"),
         {"x.en.gz": gzip.compress(GOOD, mtime=0)[:-9], "x.de": GOOD}),
    Case("cut xz", "--train-prefix {here}/x", ("cannot read", "x.en.xz", "end-of-stream", "again"),
         {"x.en.xz": lzma.compress(GOOD)[:-9], "x.de": GOOD}),
    Case("no gz", "--train-prefix {here}/x", ("cannot read", "x.de.gz", "Not a gzipped file"),
         {"x.en": GOOD, "x.de.gz": GOOD}),
    Case("two files of a side", "--train-prefix {here}/x", ("several files", "x.en.gz", "keep one"),
         {"x.en": GOOD, "x.en.gz": gzip.compress(GOOD, mtime=0), "x.de": GOOD}),
    Case("hub id without network", "--train-prefix datasets:no/where::train",
         ("cannot load datasets:no/where::train", "hub id that this machine can download")),
    Case("data set misspelt", "--train-prefix datasets:no/where", ("datasets:NAME:CONFIG:SPLIT", "got")),
    Case("vocabulary too large", "--vocab-size 50000", ("vocabulary of 50000 pieces", "at most", "--vocab-size")),
    Case("vocabulary too small", "--vocab-size 5", ("vocabulary of 5 pieces", "at least", "--vocab-size")),
    Case("budget below a pair", "--max-tokens 5", ("--max-tokens 5 is too small for a pair of", "--max-length")),
]  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("bad-input") / "text")


@pytest.fixture
def places(text, tmp_path):
    """Options that name good text, a shared cache and a new run folder."""
    prefixes = ["--train-prefix", text / "train", "--valid-prefix", text / "valid"]
    return [*prefixes, "--cache-dir", text.parent / "cache", "--output-dir", tmp_path / "run"]


def lay(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def assert_refused(verdict, says):
    assert verdict.status == 1
    assert verdict.error.startswith("error: ")
    assert "\n" not in verdict.error
    for part in says:
        assert part in verdict.error, f"{part!r} is not in {verdict.error!r}"


def names(cases):
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize("case", names(OPTION_CASES + MACHINE_CASES + FOLDER_CASES + TEXT_CASES))
def test_bad_input_is_refused_before_a_model_is_built_or_a_run_begun(case, text, places, tmp_path, monkeypatch, capsys):
    lay(tmp_path, case.files)
    for name, value in case.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(training, "build_model", lambda **_: pytest.fail("a model was built"))
    argv = case.argv.format(here=tmp_path, text=text).split()
    verdict = call("train_wmt.py", [*case.options, *places, *argv], monkeypatch, capsys)
    assert_refused(verdict, case.says)
    assert verdict.stderr == ""
    made = contents(tmp_path)
    assert {name for name in made if name.startswith("run/")} == set()  # the next start does not find a run there
    assert {name: made[name] for name in case.files} == case.files


def test_a_preset_whose_text_is_not_there_names_the_folder(tmp_path, monkeypatch, capsys):
    argv = ["--preset", "multi30k-small", "--data-dir", tmp_path / "none", "--output-dir", tmp_path / "run"]
    assert_refused(call("train_wmt.py", argv, monkeypatch, capsys), ["none/multi30k/t", "no folder"])
    assert contents(tmp_path) == {}


def test_a_tracker_that_is_not_installed_is_named_with_the_command_that_installs_it(
    places, tmp_path, monkeypatch, capsys
):
    name = next((tracker for tracker in TRACKERS if find_spec(tracker) is None), None)
    if name is None:
        pytest.skip("every tracker is installed here")
    verdict = call("train_wmt.py", [*OPTIONS, *places, "--report-to", name], monkeypatch, capsys)
    assert_refused(verdict, [f"--report-to {name}: it is not installed", f"pip install {name.replace('_', '-')}"])
    assert verdict.stderr == ""
    assert not (tmp_path / "run").exists()


def test_a_refused_start_does_not_stand_in_the_way_of_the_mended_one(places, tmp_path, monkeypatch, capsys):
    assert call("train_wmt.py", [*OPTIONS, *places, "--max-tokens", "5"], monkeypatch, capsys).status == 1
    assert call("train_wmt.py", [*OPTIONS, *places, "--max-tokens", "300"], monkeypatch, capsys).status == 0
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_pair_over_the_longest_is_dropped_counted_and_the_rest_trained_on(places, monkeypatch, capsys):
    verdict = call("train_wmt.py", [*OPTIONS, *places, "--max-length", "20"], monkeypatch, capsys)
    assert verdict.status == 0
    assert "training text: dropped 252 too_long (--max-length 20, in pieces); 48 pairs are left" in verdict.stdout


def test_no_room_for_the_cache_is_named_before_training(places, tmp_path, monkeypatch, capsys):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "pairs.arrow")

    monkeypatch.setattr(prepare, "encode_pairs", full)
    verdict = call("train_wmt.py", [*OPTIONS, *places], monkeypatch, capsys)
    assert_refused(verdict, ["No space left on device", "pairs.arrow", "bytes are free", "another --cache-dir"])
    assert contents(tmp_path) == {}


# ---- scoring a model


@pytest.fixture(scope="module")
def untold(tmp_path_factory):
    """A model folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("untold")
    build_model(
        vocab_size=99, width=16, ffn_width=24, num_layers=1, num_heads=2, dropout=0.0, attention_dropout=0.0,
        activation_dropout=0.0, pad_token_id=0, eos_token_id=1, max_length=30,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--model {model}", ["--model ", "untold", "tokenizer"]),
        ("--model no/where", ["--model no/where is neither a folder here nor a hub id", "download"]),
        ("--model {here}/none", ["none: there is no such folder"]),
        ("--model {model} --test-prefix {here}/trian", ["no file for", "trian.en"]),
        ("--model {model} --num-beams 0", ["--num-beams must be at least 1, got 0"]),
        ("--model {model} --num-beams many", ["invalid int value: 'many'"]),
        ("", ["--model DIR", "none is given"]),
    ],
)
def test_a_score_that_cannot_be_had_is_refused_in_one_line(argv, says, untold, text, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")  # whatever this machine has
    argv = argv.format(model=untold, here=tmp_path).split()
    places = ["--test-prefix", text / "test", "--output-dir", tmp_path / "scores"]
    assert_refused(call("eval_bleu.py", [*places, *argv], monkeypatch, capsys), says)
    assert contents(tmp_path) == {}


def test_a_score_on_a_device_that_is_not_here_is_refused(untold, text, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cuda:99")
    verdict = call("eval_bleu.py", ["--model", untold, "--test-prefix", text / "test"], monkeypatch, capsys)
    assert_refused(verdict, ["the device cuda:99 cannot be used here", "unset the variable"])


# ---- as a shell sees it


def test_the_program_exits_with_1_and_one_line_on_stderr(places, tmp_path):
    command = [sys.executable, SCRIPTS / "train_wmt.py", *OPTIONS, *places, "--target-lang", "fr"]
    done = subprocess.run(command, capture_output=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith(b"error: no file for ")
    assert done.stderr.endswith(b"this prefix has de, en\n")
    assert done.stderr.count(b"\n") == 1
    assert not list(tmp_path.rglob("metrics.jsonl"))


# ---- the words themselves


def test_a_user_error_is_one_line_whatever_a_library_put_into_it():
    assert str(UserError("cannot read x:\n  bad header\n\n  at byte 7\n")) == "cannot read x: bad header at byte 7"


def test_a_fault_of_the_program_is_not_taken_for_one_of_the_disk(tmp_path):
    with pytest.raises(ZeroDivisionError), writing(tmp_path, remedy="none"):
        1 / 0  # noqa: B018
    with pytest.raises(UserError, match=r"^as it was$"), writing(tmp_path, remedy="none"):
        raise UserError("as it was")


def test_a_folder_that_cannot_be_written_into_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(RunError, match=r"cannot write .*/run \(Permission denied\); give another"):
        make_folder(tmp_path / "run", remedy="give another --output-dir")
