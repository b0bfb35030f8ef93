"""Getting the machine ready: devices, precision, processor cores, seeds."""

import os
import platform
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, set_seed

from tasks.cli.errors import UserError

_THREAD_VARIABLE = "OMP_NUM_THREADS"
_DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"


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
        UserError: the tracker is unknown or not installed, the device cannot be used, or it lacks the precision.
    """
    _check_tracker(report_to)
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
    except RuntimeError as error:
        if _DEVICE_VARIABLE not in os.environ:
            raise
        raise _unusable(os.environ[_DEVICE_VARIABLE], error) from error
    _check_device(accelerator, cpu)
    use_all_cores(accelerator)
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" and bf16_is_emulated():
        accelerator.print(
            f"note: this processor ({torch.backends.cpu.get_cpu_capability()}) has no bf16 arithmetic; mixed precision "
            "bf16 is emulated on it, and many times slower than no"
        )
    set_seed(seed, device_specific=True)
    return accelerator


def bf16_is_emulated() -> bool:
    """Whether bf16 matrix products are slow on this processor: x86 without AVX-512."""
    return platform.machine().lower() in ("x86_64", "amd64") and "512" not in torch.backends.cpu.get_cpu_capability()


def _check_tracker(name: str | None) -> None:
    if name is None or name == "all":
        return
    known = sorted(LoggerType.list())
    if name not in known:
        raise UserError(f"--report-to must be one of {', '.join(known)}, got {name}")
    if name not in [str(tracker) for tracker in get_available_trackers()]:
        package = name.replace("_", "-")
        raise UserError(f"--report-to {name}: it is not installed (python -m pip install {package})")


def _check_device(accelerator: Accelerator, cpu: bool) -> None:
    device, asked = accelerator.device, os.environ.get(_DEVICE_VARIABLE)
    if cpu and device.type != "cpu":
        raise UserError(f"--cpu contradicts {_DEVICE_VARIABLE}={asked}, which accelerate prefers; unset the variable")
    try:
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise _unusable(str(device), error) from error
    if accelerator.mixed_precision == "fp16" and device.type == "cpu":  # accelerate would quietly train in fp32
        raise UserError("mixed precision fp16 needs an accelerator, and this run is on cpu; take bf16 or no")


def _unusable(device: str, error: Exception) -> UserError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    asked = os.environ.get(_DEVICE_VARIABLE)
    remedy = (
        f"{_DEVICE_VARIABLE}={asked} asks for it; unset the variable"
        if asked
        else "mend its driver, or give --cpu to work on the processor"
    )
    return UserError(f"the device {device} cannot be used here ({reason}); {remedy}")


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
