"""scripts/experiment.py: the paper's protocol from a manifest, as runs of the training scripts."""

import json
import re
import subprocess
import sys
import time

import pytest

from bad_input import SCRIPTS, call
from tasks.experiments.kinds import KINDS
from tasks.experiments.manifest import command_line, read_manifest

MANIFESTS = sorted((SCRIPTS.parent / "tasks").glob("*/experiments/*.toml"))
GOOD = """
task = "vision"
title = "toy"
updates = 12
ba_m = [2, 4]
seeds = [0, 7]
baselines = ["fixed-steps", "fixed-samples", "equal-compute"]
rate_powers = [0, 0.5]
train_samples = 110
seconds_per_update = 0.5

[options]
batch_size = 8
lr_drops = [2.0]
learning_rate = 0.2
"""
# as a script's child: it logs the updates of its option, and leaves a result; it fails once where it is told to
STUB = """
import json, pathlib, sys, time
words = dict(zip(sys.argv[2::2], sys.argv[3::2]))
folder = pathlib.Path(words["--output-dir"])
folder.mkdir(parents=True, exist_ok=True)
fault = pathlib.Path(__file__).with_name("fault")
if fault.exists() and fault.read_text() == folder.name:
    fault.unlink()
    sys.exit("error: no such thing")
updates, copies, batch = (int(words[name]) for name in ("--max-updates", "--ba-m", "--batch-size"))
gain = {(1, 8): 0.0, (1, 16): 0.05, (1, 32): 0.2}.get((copies, batch), 0.1)  # fixed samples, M = 4 are best
with (folder / "metrics.jsonl").open("a") as file:
    for update in range(1, updates + 1):
        seen = {"seen_instances": copies * batch * update, "unique_samples": batch * update}
        row = {"update": update, "loss": 2 / update, "valid_accuracy": gain + update / 60, "seconds": update / 4}
        file.write(json.dumps({**row, **seen}) + "\\n")
        file.flush()
        time.sleep(0.02 if "--log-every" in words else 0)
test = gain + 0.5 + int(words["--seed"]) / 1000 + (0.1 if float(words["--learning-rate"]) > 0.2 else 0)
results = {"updates": updates, "num_copies": copies, "seconds": updates / 4, "test_accuracy": test}
(folder / "results.json").write_text(json.dumps({**results, **seen}))
"""


@pytest.fixture
def manifest(tmp_path):
    file = tmp_path / "toy.toml"
    file.write_text(GOOD)
    return file


@pytest.fixture
def experiment(tmp_path, manifest, monkeypatch, capsys):
    """The script on the toy manifest, its training script a stub."""
    stub, folder = tmp_path / "stub.py", tmp_path / "out"
    stub.write_text(STUB)

    def run(*argv):
        argv = (manifest, "--output-dir", folder, "--launch", f"{sys.executable} {stub}", *argv)
        return call("experiment.py", argv, monkeypatch, capsys), folder

    return run


def test_fixed_samples_see_as_many_instances_in_as_many_updates_as_batch_augmentation(manifest):
    cells = {cell.group: cell for cell in read_manifest(manifest).cells()}
    options = KINDS["vision"].parse(command_line(cells["fixed-samples-m4"].options))
    ours = KINDS["vision"].parse(command_line(cells["m4"].options))
    steps = KINDS["vision"].parse(command_line(cells["fixed-steps"].options))
    assert options["max_updates"] == ours["max_updates"] == steps["max_updates"] == 12
    assert options["batch_size"] * options["ba_m"] == ours["batch_size"] * ours["ba_m"] == 32
    assert steps["batch_size"] * steps["ba_m"] == 8
    assert round(options["lr_drops"][0] * (110 // 32)) == round(steps["lr_drops"][0] * (110 // 8))
    assert ours["learning_rate"] == options["learning_rate"] == 0.2
    scaled = KINDS["vision"].parse(command_line(cells["fixed-samples-m4-rate0.5"].options))
    assert scaled["learning_rate"] == pytest.approx(0.2 * 4**0.5)
    longer = KINDS["vision"].parse(command_line(cells["equal-compute-m4"].options))
    assert (longer["max_updates"], longer["batch_size"], longer["ba_m"], longer["lr_drops"]) == (48, 8, 1, [8.0])


def test_every_cell_runs_with_every_seed_and_variants_of_copies_share_the_baselines(manifest):
    manifest.write_text(GOOD + "[ba_variants.ghost]\nghost_batch_size = 8\n[ba_variants.plain]\n")
    cells = read_manifest(manifest).cells()
    groups = {cell.group for cell in cells}
    assert groups == {
        "fixed-steps", "m2-ghost", "m2-plain", "m4-ghost", "m4-plain", "equal-compute-m2", "equal-compute-m4",
        "fixed-samples-m2", "fixed-samples-m2-rate0.5", "fixed-samples-m4", "fixed-samples-m4-rate0.5",
    }  # fmt: skip
    assert {(cell.group, cell.options["seed"]) for cell in cells} == {
        (name, seed) for name in groups for seed in (0, 7)
    }
    assert {cell.group for cell in cells if "ghost_batch_size" in cell.options} == {"m2-ghost", "m4-ghost"}


def test_variants_are_of_all_methods(manifest):
    manifest.write_text(GOOD + "[variants.mixup]\nmixup_alpha = 0.2\n[variants.plain]\n")
    mixed = {cell.group for cell in read_manifest(manifest).cells() if cell.options.get("mixup_alpha") == 0.2}
    assert {"mixup-fixed-steps", "mixup-m4", "mixup-fixed-samples-m4"} <= mixed
    assert all(name.startswith("mixup-") for name in mixed)


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("ba_m = [2, 4]", "ba_m = [1, 4]", r"toy.toml: ba_m must be .* at least 2, got \[1, 4\]"),
        ("ba_m = [2, 4]", "ba_m = 4", "ba_m must be a list"),
        ("seeds = [0, 7]", "seeds = [3, 3]", r"seeds names a value twice: \[3, 3\]"),
        ("updates = 12", "updates = 0", "updates must be a whole number of at least 1, got 0"),
        ("updates = 12", "update = 12", "toy.toml: the key update is not one of a manifest; did you mean updates?"),
        ("updates = 12", "", "the key updates is missing"),
        ('task = "vision"', 'task = "speech"', "task must be one of translation, .*, got 'speech'"),
        ("learning_rate = 0.2", "learning_rat = 0.2", "options: learning_rat is not .*train_vision.py; did you mean"),
        ("learning_rate = 0.2", "learning_rate = -1", "toy.toml: options: --learning-rate must be at least 0"),
        ("learning_rate = 0.2", "ba_m = 4", "options: ba_m is set by the manifest's ba_m; leave it out"),
        ("learning_rate = 0.2", "[evaluation]\nviews = 3", "toy.toml: evaluation: unknown option --views"),
        ("learning_rate = 0.2", "[ba_variants.a]\nflip = 7", "the run m2-a-seed0: --flip"),
        ('"equal-compute"', '"equal-work"', "baselines must be a list of"),
        ("[0, 0.5]", '["sqrt"]', "rate_powers must be a list of numbers from 0 to 4"),
        ("= 0.5", "= 0.5.1", "toy.toml cannot be read as a manifest"),
    ],
)
def test_a_wrong_manifest_is_refused_before_anything_runs(before, after, error, experiment, manifest):
    assert before in GOOD
    manifest.write_text(GOOD.replace(before, after, 1))
    verdict, folder = experiment()
    assert verdict.status == 1
    assert not folder.exists()
    assert re.search(error, verdict.error), verdict.error


def test_finished_runs_are_skipped_and_a_failed_one_is_named_and_run_again(experiment, tmp_path):
    (tmp_path / "fault").write_text("m4-seed7")
    verdict, folder = experiment("--jobs", 2)
    assert verdict.status == 1
    assert re.search(
        "1 of 18 runs failed .*m4-seed7 ended with status 1: .*no such thing; see .*log.txt", verdict.error
    )
    finished = {path.parent.name for path in folder.glob("*/results.json")}
    assert len(finished) == 17
    stamps = {name: (folder / name / "results.json").stat().st_mtime_ns for name in finished}
    verdict, _ = experiment()
    assert verdict.status == 0, verdict.error
    assert "18 runs, 17 of them finished" in verdict.stdout
    assert {name: (folder / name / "results.json").stat().st_mtime_ns for name in finished} == stamps
    assert (folder / "m4-seed7" / "results.json").exists()


def test_hours_are_said_before_the_start(experiment, manifest):
    verdict, folder = experiment("--dry-run")
    assert "m4-seed0: 12 updates, about 24 s" in verdict.stdout  # 12 updates of 4 copies, 0.5 s each
    assert "equal-compute-m4-seed7: 48 updates, about 24 s" in verdict.stdout
    assert not folder.exists()


def test_without_stated_seconds_some_updates_are_timed(experiment, manifest):
    manifest.write_text(GOOD.replace("seconds_per_update = 0.5", ""))
    verdict, folder = experiment("--dry-run")
    assert verdict.status == 0, verdict.error
    assert re.search(r"equal-compute-m4-seed7: 48 updates, about [1-3] s", verdict.stdout), verdict.stdout
    assert not list(folder.glob("*"))


@pytest.mark.slow
def test_a_stopped_experiment_stops_its_runs_and_starts_no_other(manifest, tmp_path):
    stub, folder = tmp_path / "stub.py", tmp_path / "out"
    stub.write_text(STUB.replace("time.sleep(0.02", "time.sleep(60").replace("else 0)", "else 60)"))
    words = [sys.executable, SCRIPTS / "experiment.py", manifest, "--output-dir", folder, "--jobs", "2"]
    process = subprocess.Popen([*words, "--launch", f"{sys.executable} {stub}"], text=True, stdout=subprocess.PIPE)
    while len(list(folder.glob("*/metrics.jsonl"))) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "the same command goes on" in said
    assert len(list(folder.glob("*/log.txt"))) == 2
    assert not list(folder.glob("*/results.json"))


def test_a_folder_of_another_manifest_is_refused(experiment, manifest):
    assert experiment()[0].status == 0
    manifest.write_text(GOOD.replace("learning_rate = 0.2", "learning_rate = 0.3"))
    verdict, folder = experiment()
    assert verdict.status == 1
    assert "was run with learning_rate 0.2, and the manifest now has 0.3" in verdict.error
    kept = json.loads((folder / "experiment.json").read_text())
    assert kept["manifest"]["options"]["learning_rate"] == 0.2


def table(text, title):
    """Its rows, by their first cell."""
    lines = text.partition(title)[2].split("\n")[1:]
    return {row[0]: row[1:] for row in (re.split(r"  +", line.strip()) for line in lines[: lines.index("")])}


def test_the_tables_tell_who_wins_and_who_does_not(experiment):
    verdict, folder = experiment()
    assert verdict.status == 0, verdict.error
    text = (folder / "tables.txt").read_text()
    assert text.strip() in verdict.stdout
    two = table(text, "Batch Augmentation against its baselines (Table 2)\n")
    # seeds 0 and 7: 0.35 above the first, and a standard deviation of 0.7 / sqrt(2)
    assert two["M = 4"] == ["test, %", "60.35 ± 0.49", "50.35 ± 0.49", "70.35 ± 0.49", "50.35 ± 0.49"]
    assert re.search(r"M = 4 on test beats fixed steps by 10.00 points \(p = 0.002, Welch's t\)", text)
    assert re.search(r"M = 4 on test does NOT win over fixed samples, B times 4: it is 10.00 points worse", text)
    runs = table(text, "All runs\n")
    assert runs["M = 4"][3:5] == runs["fixed samples, B times 4"][3:5] == ["12", "384"]
    assert runs["equal compute, updates times 4"][3:5] == ["48", "384"]
    reach = table(text, "Updates until the baseline's final quality\n")
    assert reach["fixed steps"] == ["12", "1.00", "1.00"]
    assert reach["M = 4"] == ["6", "2.00", "2.00"]  # 0.1 + 6/60 = 12/60; half the updates, four times the instances
    speed = table(text, "Throughput (Table 5)\n")
    assert speed["32"][-3:] == ["128.0", "0.0", "66"]  # 32 instances in a quarter of a second, of six runs
    assert {path.name for path in (folder / "figures").iterdir()} == {
        f"{name}.{kind}" for name in ("copies", "final", "samples-m2", "samples-m4", "reach") for kind in ("svg", "png")
    }


@pytest.mark.parametrize("file", MANIFESTS, ids=lambda file: f"{file.parts[-3]}-{file.stem}")
def test_the_manifests_of_the_project_are_right(file, monkeypatch, tmp_path):
    monkeypatch.setenv("SEQBA_DATA", str(tmp_path))
    manifest = read_manifest(file)
    assert manifest.task == file.parts[-3]
    names = [cell.name for cell in manifest.cells()]
    assert len(set(names)) == len(names)
