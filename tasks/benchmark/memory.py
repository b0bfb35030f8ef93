"""The peak of what an update holds in memory, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tasks.benchmark.ratios import Row


def peak_bytes(module: str, plan: Any, *, with_gaps: bool) -> int:
    """The most memory that model, optimizer and two updates hold at once, in a new process.

    On a GPU what torch's allocator handed out; on a processor the peak of the process's resident memory over what it
    had before the model was made.

    Args:
        module: run as `python -m MODULE PLAN`; it prints what `measure_peak` says of its plan.
        plan: a dataclass of JSON values.
        with_gaps: on a processor, with the gaps that freed tensors leave in the C library's heap, which depend on the
            library and on luck; without them every tensor of 64 KiB and more is given back when it is freed.
    """
    heap = {} if with_gaps else {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}  # glibc's
    command = [sys.executable, "-m", module, json.dumps(asdict(plan))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **heap})
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {plan} failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


def measure_peak(update_of: Callable[[Any], Callable[[], object]], plan: Any) -> int:
    """Bytes at the peak of two updates of `update_of(plan)`, in this process; `plan.cpu` keeps them off a GPU."""
    on_gpu = torch.cuda.is_available() and not plan.cpu
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = 0 if on_gpu else _resident("VmRSS")
    update = update_of(plan)
    for _ in range(2):
        update()
    return torch.cuda.max_memory_allocated() if on_gpu else _resident("VmHWM") - before


def compare_peaks(module: str, name: str, wanted: str, a: Any, b: Any) -> Row:
    """The peak of plan `a` over that of `b`, each in a process, once without and once with the gaps in the heap."""
    held, resident = ([peak_bytes(module, plan, with_gaps=gaps) for plan in (a, b)] for gaps in (False, True))
    detail = (
        f"a process each: {held[0] / 2**20:,.0f} MiB over {held[1] / 2**20:,.0f} MiB; with the "
        f"gaps in a processor's heap {resident[0] / resident[1]:.3f}"
    )
    return Row(name, f"{held[0] / held[1]:.3f}", wanted, detail)


def _resident(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
