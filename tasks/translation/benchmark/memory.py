"""Peak memory of an update, each plan in a process of its own: python -m tasks.translation.benchmark.memory PLAN."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.translation.benchmark.synthetic import Shape, update_of
from tasks.translation.model import TranslationLoss


@dataclass(frozen=True)
class Plan:
    """An update whose memory is measured; `lean` is the loss that never holds all logits."""

    num_copies: int
    copies_per_pass: int
    shape: Shape
    lean: bool = True
    mixed_precision: str = "no"
    cpu: bool = False


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


class PlainLoss(TranslationLoss):
    """The same loss on all logits at once, as torch's cross-entropy is used by everybody."""

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Summed nats; `batch` as `TranslationLoss` takes it."""
        inputs = {name: x for name, x in batch.items() if name != "labels"}
        logits = self.model(**inputs).logits.float()
        return F.cross_entropy(
            logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum", label_smoothing=self.label_smoothing
        )


def _measure(plan: Plan) -> int:
    before = 0
    if torch.cuda.is_available() and not plan.cpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident("VmRSS")
    loss_class: type[nn.Module] = TranslationLoss if plan.lean else PlainLoss
    update = update_of(
        plan.shape,
        num_copies=plan.num_copies,
        copies_per_pass=plan.copies_per_pass,
        loss_class=loss_class,
        mixed_precision=plan.mixed_precision,
        cpu=plan.cpu,
    )
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
