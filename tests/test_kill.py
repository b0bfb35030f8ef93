"""kill -9 at ten random moments of a training run, half of them while a checkpoint is being written."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tasks.run.log import read_metrics

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_wmt.py"
UPDATES = 300
OPTIONS = (
    "--ba-m 2 --width 64 --ffn-width 128 --num-layers 1 --num-heads 2 --max-tokens 200 --warmup-updates 50 "
    f"--max-updates {UPDATES} --log-every 7 --eval-every 90 --save-every 3 --num-beams 1 --vocab-size 600 --cpu"
).split()


def start(folder, *more):
    places = ["--cache-dir", str(folder.parent / "cache"), "--output-dir", str(folder)]
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *OPTIONS, *places, *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-3000:]
    return output


def saved(folder):
    return {path.name for path in (folder / "checkpoints").glob("update-*")}


def wait_for(condition, process, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end
        time.sleep(0.0005)


def is_writing(folder):
    return any(not path.name.startswith("update-") for path in (folder / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.trap(24)
def test_ten_kills_at_random_moments_end_bitwise_where_the_undisturbed_run_does(tmp_path):
    finish(start(tmp_path / "straight"))
    folder, chance = tmp_path / "killed", random.Random(0)
    while_writing = 0
    for kill in range(10):
        before = saved(folder)
        process = start(folder, "--resume")
        wait_for(lambda before=before: saved(folder) - before, process)  # it got further than the last one
        time.sleep(chance.random() * 0.7)
        if kill % 2:
            wait_for(lambda: is_writing(folder), process)
        process.kill()
        process.communicate()
        while_writing += is_writing(folder)
    assert while_writing >= 3  # partial folders were left behind, and are not taken for checkpoints
    newest = max(int(name.removeprefix("update-")) for name in saved(folder))
    assert newest < UPDATES
    assert "resumed at update" in finish(start(folder, "--resume"))

    straight, killed = (
        load_file(f / "checkpoints" / f"update-{UPDATES:06d}" / "model.safetensors")
        for f in (tmp_path / "straight", folder)
    )
    assert all(torch.equal(straight[name], killed[name]) for name in straight)
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_metrics(f / "metrics.jsonl")]
        for f in (tmp_path / "straight", folder)
    ]
    assert rows[0] == rows[1]
    scores = [json.loads((f / "results.json").read_text())["tests"] for f in (tmp_path / "straight", folder)]
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_and_exits_without_a_traceback(number, tmp_path):
    folder = tmp_path / "run"
    process = start(folder)
    wait_for(lambda: (folder / "checkpoints").is_dir() and saved(folder), process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "stopped after update" in output
    stopped = int(output.split("stopped after update ")[1].split(";")[0])
    assert f"update-{stopped:06d}" in saved(folder)
    assert f"resumed at update {stopped} " in finish(start(folder, "--resume"))
