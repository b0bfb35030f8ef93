"""A killed rank under `torchrun --max-restarts`, a rank that hangs, two machines: what becomes of the run."""

import os
import re
import subprocess
import sys
import time

import pytest
import torch
from group_runs import SCRIPTS as OPTIONS
from group_runs import write_text
from safetensors.torch import load_file

from bad_input import SCRIPTS
from distributed import _environment

# a rank of the first start ends by SIGKILL, or stops answering, once it has done an update
FAULT = """
import os, runpy, signal, sys, time
import tasks.translation.train as training

update, rank, how = int(os.environ["AT"]), os.environ["AT_RANK"], os.environ["HOW"]
whole = training.TrainStep.__call__

def step(self, batches, *, update):
    result = whole(self, batches, update=update)
    first = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if first and update == int(os.environ["AT"]) and os.environ["RANK"] == rank:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return result

training.TrainStep.__call__ = step
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
RUN = (
    "--ba-m 2 --ranks-per-group 2 --max-updates 12 --save-every 4 --eval-every 6 --log-every 2 "
    "--cpu --num-threads 1 --resume"
)


def launch(folder, out, *, at=0, rank=1, how="kill", launcher=(), options=(), wait=True):
    script = folder / "fault.py"
    script.write_text(FAULT)
    text = [part for split in ("train", "valid") for part in (f"--{split}-prefix", folder / "text")]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
        *(launcher or ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1")),
        script, SCRIPTS / "train_wmt.py", *OPTIONS["translation"].split(), *RUN.split(), *text,
        "--cache-dir", folder / "cache", "--output-dir", folder / out, *options,
    ]  # fmt: skip
    environment = {**_environment(folder), "AT": str(at), "AT_RANK": str(rank), "HOW": how}
    process = subprocess.Popen(
        [*map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return process.communicate(timeout=300)[0] if wait else process


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    write_text(folder)
    said = launch(folder, "whole")
    assert (folder / "whole" / "results.json").exists(), said[-3000:]
    return folder, load_file(folder / "whole" / "model" / "model.safetensors")


def same(folder, out, want):
    got = load_file(folder / out / "model" / "model.safetensors")
    return all(torch.equal(got[name], x) for name, x in want.items())


@pytest.mark.slow
@pytest.mark.parametrize(("at", "rank"), [(2, 1), (7, 0)])
def test_a_killed_rank_brings_the_job_back_to_its_last_checkpoint(at, rank, undisturbed):
    folder, want = undisturbed
    local = ("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", "--max-restarts=2")
    said = launch(folder, f"killed{at}", at=at, rank=rank, launcher=local)
    assert (folder / f"killed{at}" / "results.json").exists(), said[-3000:]
    assert ("resumed at update 6" in said) == (at > 6)
    assert same(folder, f"killed{at}", want)


@pytest.mark.slow
def test_a_rank_that_does_not_answer_ends_the_run_with_an_error(undisturbed):
    folder, _ = undisturbed
    start = time.monotonic()
    said = launch(folder, "hung", at=3, how="hang", options=["--rank-timeout", "8"])
    assert "error: another rank ended or did not answer in time" in said, said[-3000:]
    assert time.monotonic() - start < 100


@pytest.mark.slow
def test_two_machines_train_as_one(undisturbed):
    folder, _ = undisturbed
    port = 20_000 + os.getpid() % 20_000
    join = (
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=7",
        "--local-addr=127.0.0.1",
    )
    agents = [launch(folder, "two", launcher=join, wait=False) for _ in range(2)]
    said = [agent.communicate(timeout=300)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said[0][-3000:]
    assert any(re.search(r"4 process\(es\)", text) for text in said)
    assert (folder / "two" / "results.json").exists()
