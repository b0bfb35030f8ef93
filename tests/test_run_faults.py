"""What befalls a run that has begun: refused continuations, damage, numbers that are not finite, a full disk."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from bad_input import OPTIONS, SCRIPTS, call, contents, write_text
from seqba.checkpoint import find_checkpoint
from seqba.checkpoint import folder as checkpoint_module
from tasks.run import loop as run_module
from tasks.run.log import read_metrics
from tasks.translation import result
from tasks.translation import train as training

DIVERGING = ["--lr-scale", "1e30"]  # the first update is finite, and leaves weights whose loss is not


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("run-faults") / "text")


@pytest.fixture
def train(text, tmp_path, monkeypatch, capsys):
    """`train_wmt.py` on good text, in a folder of the test's."""

    def call_it(*argv, folder="run"):
        places = ["--train-prefix", text / "train", "--valid-prefix", text / "valid"]
        places += ["--cache-dir", text.parent / "cache", "--output-dir", tmp_path / folder]
        return call("train_wmt.py", [*OPTIONS, *places, *argv], monkeypatch, capsys)

    return call_it


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    """A run of 4 updates with checkpoints of updates 2 and 4, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        argv = [*OPTIONS, "--train-prefix", text / "train", "--valid-prefix", text / "valid"]
        argv += ["--cache-dir", text.parent / "cache", "--output-dir", folder / "run"]
        assert call("train_wmt.py", argv, patch, _Quiet()).status == 0
    return folder / "run"


class _Quiet:
    """Stands for pytest's `capsys` where a fixture outlives a test."""

    def readouterr(self):
        return "", ""


@pytest.fixture
def begun(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def assert_refused(verdict, *says):
    assert verdict.status == 1
    assert verdict.error.startswith("error: ")
    assert "\n" not in verdict.error
    for part in says:
        assert part in verdict.error, f"{part!r} is not in {verdict.error!r}"


def weights(folder, update):
    return load_file(folder / "checkpoints" / f"update-{update:06d}" / "model.safetensors")


def assert_same_weights(folder, other, update):
    want, got = weights(folder, update), weights(other, update)
    assert all(torch.equal(want[name], got[name]) for name in want)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-9])


# ---- continuations that are refused leave every file as it was


def nothing(folder, text):
    return []


def resume(*argv):
    return lambda folder, text: ["--resume", *argv]


def with_other_text(folder, text):
    return ["--resume", "--train-prefix", str(text / "other")]


def with_other_validation_text(folder, text):
    return ["--resume", "--valid-prefix", str(text / "test")]


def without_config(folder, text):
    (folder / "config.json").unlink()
    return ["--resume"]


def with_half_a_config(folder, text):
    truncate(folder / "config.json")
    return ["--resume"]


def with_a_broken_row(folder, text):
    rows = (folder / "metrics.jsonl").read_text().split("\n")
    (folder / "metrics.jsonl").write_text("\n".join([rows[0], rows[1][:9], *rows[2:]]))
    return ["--resume"]


def with_no_good_checkpoint(folder, text):
    truncate(folder / "checkpoints" / "update-000002" / "model.safetensors")
    truncate(folder / "checkpoints" / "update-000004" / "manifest.json")
    return ["--resume"]


def with_checkpoints_alone(folder, text):
    for path in folder.iterdir():
        if path.name != "checkpoints":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return []


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (nothing, ["already holds a run", "--resume", "another --output-dir", "config.json", "checkpoints"]),
        (with_checkpoints_alone, ["already holds a run", "found checkpoints"]),
        (resume("--ba-m", "3"), ["begun with another configuration: ba_m was 2, is 3", "another --output-dir"]),
        (
            resume("--width", "32", "--dropout", "0.2"),
            ["another configuration: dropout was 0.1, is 0.2; width was 16, is 32", "the options it was begun with"],
        ),
        (with_other_text, ["update-000004 does not fit this run", "data is not what", "another --output-dir"]),
        (with_other_validation_text, ["update-000004 does not fit this run", "data is not what"]),
        (without_config, ["config.json is missing", "restore it, or give another --output-dir"]),
        (with_half_a_config, ["config.json cannot be read", "restore it, or give another --output-dir"]),
        (with_a_broken_row, ["metrics.jsonl has a line that is no row of metrics", "take the line out"]),
        (
            with_no_good_checkpoint,
            ["no checkpoint in", "is intact", "update-000004", "manifest.json", "update-000002", "model.safetensors"],
        ),
    ],
)
def test_a_run_is_not_continued_by_another_and_keeps_every_byte(prepare, says, begun, text, train):
    argv = prepare(begun, text)
    before = contents(begun)
    assert_refused(train(*argv), *says)
    assert contents(begun) == before


def test_a_run_that_was_begun_in_the_meantime_is_not_overwritten(begun, tmp_path, train, monkeypatch):
    """Two starts for one folder: the second finds out when its text is ready."""
    before = contents(begun)
    begun.rename(tmp_path / "first")
    build = training.build_model

    def slowly(**options):
        (tmp_path / "run").rmdir()
        (tmp_path / "first").rename(tmp_path / "run")
        return build(**options)

    monkeypatch.setattr(training, "build_model", slowly)
    assert_refused(train(), "already holds a run")
    assert contents(begun) == before


def test_resuming_where_nothing_was_begun_starts_and_says_so(train, tmp_path, finished):
    verdict = train("--resume")
    assert verdict.status == 0
    assert "nothing to resume from: starting at update 1" in verdict.stdout
    assert_same_weights(tmp_path / "run", finished, 4)


# ---- damaged checkpoints


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_truncated_checkpoint_is_named_and_the_one_before_it_continued(file, begun, finished, train):
    truncate(begun / "checkpoints" / "update-000004" / file)
    verdict = train("--resume")
    assert verdict.status == 0
    assert "update-000004 is damaged and passed over: " + file in verdict.stdout
    assert "resumed at update 2 from" in verdict.stdout
    assert_same_weights(begun, finished, 4)


def test_a_damaged_best_checkpoint_is_named_and_the_newest_weights_are_the_result(begun, train, monkeypatch):
    """The best one is the last here: the loss falls. Two more updates make it an earlier one."""
    validate = training.validation_loss
    monkeypatch.setattr(training, "validation_loss", lambda *a: validate(*a) + 100)
    assert train("--resume", "--max-updates", "6").status == 0
    truncate(begun / "checkpoints" / "update-000004" / "model.safetensors")
    verdict = train("--resume", "--max-updates", "6")
    assert "the best checkpoint, of update 4, is gone, and no update is left to find another" in verdict.error
    (begun / "results.json").unlink()  # no result is there that a worse one would replace
    verdict = train("--resume", "--max-updates", "6")
    assert verdict.status == 0
    assert "the best checkpoint, of update 4, is gone: the best from here on is kept" in verdict.stdout
    final, newest = load_file(begun / "model" / "model.safetensors"), weights(begun, 6)
    assert torch.equal(final["model.shared.weight"], newest["model.shared.weight"])


# ---- numbers that are not finite


def good(folder):
    """The newest checkpoint, which is whole, and holds no nan or infinite weight."""
    path, faults = find_checkpoint(folder / "checkpoints")
    assert not faults
    assert all(torch.isfinite(x).all() for x in load_file(path / "model.safetensors").values())
    return path


def test_a_loss_that_is_not_finite_names_update_samples_and_the_good_checkpoint(train, tmp_path, monkeypatch):
    met, record = {}, run_module.Run.record

    def noting(self, update, outcome, sample_ids):
        met.setdefault(update, sample_ids)
        record(self, update, outcome, sample_ids)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "record", noting)
        assert train(folder="calm").status == 0
    verdict = train(*DIVERGING, "--eval-every", "100", "--save-every", "1")
    ids = ", ".join(map(str, met[2][:16]))
    assert_refused(verdict, "update 2: loss nan", f"samples {ids}", "update-000001", "lower the learning rate")
    assert good(tmp_path / "run").name == "update-000001"
    assert [row["update"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1]


def test_a_validation_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    verdict = train(*DIVERGING, "--eval-every", "1")
    assert_refused(
        verdict, "the validation's valid_loss after update 1 is nan", "samples", "No checkpoint was written yet"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_are_not_finite_never_push_a_good_checkpoint_out(train, tmp_path, monkeypatch):
    """The update's own loss was finite; the weights it left are not."""
    whole = training.TrainStep.__call__

    def overflow_at_3(self, batches, *, update):
        outcome = whole(self, batches, update=update)
        if update == 3:
            with torch.no_grad():
                next(self.model.parameters())[5, 7] = float("inf")
        return outcome

    monkeypatch.setattr(training.TrainStep, "__call__", overflow_at_3)
    verdict = train("--eval-every", "100", "--save-every", "1")
    assert_refused(verdict, "the weights after update 3 are not finite", "samples", "update-000002")
    assert good(tmp_path / "run").name == "update-000002"


# ---- a full disk


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_the_second_checkpoint(patch):
    seal = checkpoint_module.write_manifest
    patch.setattr(checkpoint_module, "write_manifest", lambda folder, n: no_space() if n == 4 else seal(folder, n))


def at_a_row_of_metrics(patch):
    whole = Path.open

    def open_it(path, mode="r", *args, **options):
        if path.name == "metrics.jsonl" and mode == "a" and len(read_metrics(path)) == 3:
            no_space()
        return whole(path, mode, *args, **options)

    patch.setattr(Path, "open", open_it)


def at_the_curve(patch):
    patch.setattr(run_module, "draw_curve", no_space)


def at_the_model_folder(patch):
    def fail(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    patch.setattr(result, "save_model_folder", fail)


@pytest.mark.parametrize(
    ("fill", "newest"),
    [
        (at_the_second_checkpoint, "update-000002"),
        (at_a_row_of_metrics, "update-000002"),
        (at_the_model_folder, "update-000004"),
        (at_the_curve, "update-000004"),
    ],
)
def test_a_full_disk_stops_the_run_and_with_room_again_it_ends_as_if_nothing_had_been(
    fill, newest, train, tmp_path, finished, monkeypatch
):
    with monkeypatch.context() as patch:
        fill(patch)
        verdict = train()
    assert_refused(verdict, "No space left on device", "bytes are free", "make room", "with --resume goes on from")
    assert good(tmp_path / "run").name == newest
    assert train("--resume").status == 0
    assert_same_weights(tmp_path / "run", finished, 4)
    assert [row["update"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "results.json").is_file()


def test_a_file_that_may_not_grow_stops_the_program_with_one_line_and_keeps_the_earlier_checkpoint(
    text, tmp_path, begun, finished
):
    """The real thing: the system refuses to write past 60 kB, which a model takes and an optimizer does not."""
    shutil.rmtree(begun / "checkpoints" / "update-000004")
    argv = [*OPTIONS, "--train-prefix", text / "train", "--valid-prefix", text / "valid", "--resume"]
    argv += ["--cache-dir", text.parent / "cache", "--output-dir", begun]
    done = subprocess.run(
        [sys.executable, SCRIPTS / "train_wmt.py", *argv],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "resumed at update 2" in done.stdout
    assert "Traceback" not in done.stderr
    last = re.split(r"[\r\n]", done.stderr.strip())[-1]  # the progress bar stands before it
    for part in ("error: checkpoint ", "update-000004 was not written (File too large)", "--resume goes on from"):
        assert part in last
    assert good(begun).name == "update-000002"
