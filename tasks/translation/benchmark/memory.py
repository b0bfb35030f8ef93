"""Peak memory of an update, each plan in a process of its own: python -m tasks.translation.benchmark.memory PLAN."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tasks.translation.benchmark.synthetic import Plan, Shape, update_of


def peak_bytes(plan: Plan, *, with_gaps: bool = False) -> int:
    """The most memory that model, optimizer and two updates hold at once, in a new process.

    On a GPU what torch's allocator handed out; on a processor the peak of the process's resident memory over what it
    had before the model was made.

    Args:
        plan: what is measured.
        with_gaps: on a processor, with the gaps that freed tensors leave in the C library's heap, which depend on the
            library and on luck; by default every tensor of 64 KiB and more is given back when it is freed.
    """
    heap = {} if with_gaps else {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # glibc's
    done = subprocess.run(
        [sys.executable, "-m", __name__, json.dumps(asdict(plan))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **heap},
    )
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {plan} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def _measure(plan: Plan) -> int:
    before = 0
    if torch.cuda.is_available() and not plan.cpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
    update = update_of(plan)
    for _ in range(2):
        update()
    if torch.cuda.is_available() and not plan.cpu:
        return torch.cuda.max_memory_allocated()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    values = json.loads(sys.argv[1])
    print(_measure(Plan(**{**values, "shape": Shape(**values["shape"])})))
