"""Run a script on several ranks, real processes over gloo on CPU, and collect what each rank reports.

`accelerate launch --cpu --num_processes 2` quietly runs one process; `torch.distributed.run` runs as many as told, and
`run_ranks` refuses any other number. The script says what it found with `report`:

    RANKS = '''
    from accelerate import Accelerator
    from distributed import report

    accelerator = Accelerator(cpu=True)
    report({"num_processes": accelerator.num_processes, "rank": accelerator.process_index})
    '''
    assert [rank["num_processes"] for rank in run_ranks(RANKS, 2)] == [2, 2]
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import seqba

RESULTS = "SEQBA_TEST_RESULTS"  # the folder each rank writes its result into


def report(result: object) -> None:
    """Hand this rank's result, any JSON value, to `run_ranks`; called once, at the script's end."""
    path = Path(os.environ[RESULTS]) / f"{os.environ['RANK']}.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():  # a rank that leaves while another still talks to it would abort it
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def run_ranks(
    code_or_path: str | Path, num_ranks: int, *, args: Sequence[str] = (), timeout: float = 180, **environment: str
) -> list[Any]:
    """Run a script under `python -m torch.distributed.run` and return what rank 0, 1, ... reported.

    Args:
        code_or_path: a script's text (dedented), or its path.
        num_ranks: processes, all on this machine and on CPU, one thread each, meeting on a free port.
        args: the script's arguments.
        timeout: seconds, after which every process is killed.
        environment: more environment variables.

    Raises:
        AssertionError: a rank failed, reported nothing, or there were not `num_ranks`; with the end of the output.
    """
    with tempfile.TemporaryDirectory() as folder:
        script = Path(code_or_path) if isinstance(code_or_path, Path) else Path(folder) / "script.py"
        if not isinstance(code_or_path, Path):
            script.write_text(textwrap.dedent(code_or_path), encoding="utf-8")
        rendezvous = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
        launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, f"--nproc-per-node={num_ranks}"]
        results = Path(folder) / "results"
        results.mkdir()
        returncode, output = _run([*launcher, str(script), *args], timeout, _environment(results) | environment)
        reported = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in results.iterdir()}
    ranks = [str(rank) for rank in range(num_ranks)]
    if returncode != 0 or sorted(reported) != sorted(ranks):
        raise AssertionError(f"exit {returncode}, ranks {sorted(reported)} of {ranks} reported; {output[-6000:]}")
    return [reported[rank] for rank in ranks]


def _environment(results: Path) -> dict[str, str]:
    """This process's variables, without those of a launcher or a device, with the tests and this seqba importable."""
    launchers = ("ACCELERATE_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(launchers)}
    here, library = Path(__file__).parent, Path(seqba.__file__).parents[1]
    importable = [str(here), str(library), *filter(None, [os.environ.get("PYTHONPATH")])]
    return kept | {
        "PYTHONPATH": os.pathsep.join(importable),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
        "TOKENIZERS_PARALLELISM": "false",
        RESULTS: str(results),
    }


def _run(command: list[str], timeout: float, environment: dict[str, str]) -> tuple[int, str]:
    """Run a command in a session of its own, so that a timeout ends its children too."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            raise AssertionError(f"{command} ran past {timeout} s; {output[-6000:]}") from error
    return process.returncode, output
