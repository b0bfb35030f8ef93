"""Getting the machine ready: devices, precision, processor cores, seeds."""

import os
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from tasks.errors import UserError

_THREAD_VARIABLE = "OMP_NUM_THREADS"


def start_accelerator(
    *,
    seed: int,
    mixed_precision: str | None = None,
    report_to: str | None = None,
    folder: Path | None = None,
    cpu: bool = False,
) -> Accelerator:
    """An `Accelerator` for a training script: seeded per rank, on all cores where it is alone on a CPU.

    Every rank draws its own numbers (seed + rank): with one seed for all, copies on different ranks would meet equal
    dropout masks. Data order has seeds of its own.

    Args:
        seed: the run's seed.
        mixed_precision: "no", "bf16", "fp16"; None leaves it to `accelerate launch` and its configuration.
        report_to: a tracker that accelerate knows ("tensorboard", "wandb" ...), or None.
        folder: where trackers write.
        cpu: use the processor even where an accelerator is at hand.

    Raises:
        UserError: the tracker is not installed, or the precision is not one that the device has.
    """
    try:
        accelerator = Accelerator(
            mixed_precision=mixed_precision,
            log_with=report_to,
            project_dir=folder,
            cpu=cpu,
            step_scheduler_with_optimizer=False,
        )
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    if report_to is not None and not accelerator.log_with:
        raise UserError(f"--report-to {report_to}: it is not installed (python -m pip install {report_to})")
    use_all_cores(accelerator)
    set_seed(seed, device_specific=True)
    return accelerator


def use_all_cores(accelerator: Accelerator) -> int:
    """Give a single-process CPU run every core it may use; returns the number of threads.

    `accelerate launch` exports OMP_NUM_THREADS=1 for CPU runs, which leaves all cores but one asleep. A
    number that the user chose (the variable set before the launcher, or its own option) is kept.
    """
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
    if alone and not _user_chose_threads():
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    return torch.get_num_threads()


def _user_chose_threads() -> bool:
    """Whether OMP_NUM_THREADS holds the user's wish, and not the launcher's default of 1."""
    value = os.environ.get(_THREAD_VARIABLE)
    if value is None:
        return False
    if value != "1" or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return True  # the launcher only ever fills in 1, and always says its precision
    parent = Path(f"/proc/{os.getppid()}")
    try:
        environment = (parent / "environ").read_bytes().split(b"\0")
        command = (parent / "cmdline").read_bytes()
    except OSError:
        return False  # no such record on this system: a lone launched process wants its cores
    return b"num_cpu_threads_per_process" in command.replace(b"-", b"_") or any(
        line.startswith(_THREAD_VARIABLE.encode() + b"=") for line in environment
    )
