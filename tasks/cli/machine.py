"""Getting the machine ready: devices, precision, processor cores, seeds."""

import ctypes
import logging
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, LoggerType, set_seed

from tasks.cli.errors import UserError, reason_of
from tasks.cli.log import show_log
from tasks.cli.options import OptionParser, check_choices, check_least, option

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT")

_MOST_THREADS = 8  # for each core
PRECISIONS = ("no", "bf16", "fp16")
_DEVICE_VARIABLE = "ACCELERATE_TORCH_DEVICE"
_MMAP_VARIABLE = "MALLOC_MMAP_THRESHOLD_"  # the user's own choice
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@dataclass(frozen=True)
class MachineOptions:
    """Where a script computes, options of all of them."""

    mixed_precision: str | None = option(
        None, "by default what accelerate is configured to", group="machine", choices=PRECISIONS
    )
    cpu: bool = option(False, "use the processor even where an accelerator is at hand")
    num_threads: int | None = option(
        None, "threads of a process on the processor; by default all cores where one process runs alone"
    )
    rank_timeout: int = option(1_800, "seconds that a rank waits for the others before it ends with an error")

    def __post_init__(self) -> None:
        check_least(self, {"num_threads": 1, "rank_timeout": 1})
        most = _MOST_THREADS * (os.cpu_count() or 1)
        if self.num_threads is not None and self.num_threads > most:
            raise UserError(
                f"--num-threads must be at most {most}, {_MOST_THREADS} for each core, got {self.num_threads}"
            )
        check_choices(self)


def parse_with_machine(config: type[ConfigT], argv: Sequence[str] | None, text: str) -> tuple[ConfigT, MachineOptions]:
    """Options of a script that does not train, from the command line (`--num-threads` and `--num_threads` alike).

    Args:
        config: dataclass of the script's own options.
        text: what the script does, for its help.

    Raises:
        UserError: a value out of range, an option that is unknown or missing; the message names it.
    """
    parser = OptionParser((config, MachineOptions), allow_abbrev=False, description=text)
    parser.parse_known_options(argv)  # before a misspelt option is missed as a required one
    own, machine = parser.parse_args_into_dataclasses(argv)
    return own, machine


def start_accelerator(
    machine: MachineOptions, *, seed: int, report_to: str | None = None, folder: Path | None = None
) -> Accelerator:
    """An `Accelerator` for a script: seeded per rank, on all cores where it is alone on a CPU; it shows the log.

    Every rank draws its own numbers (seed + rank): with one seed for all, copies on different ranks would meet equal
    dropout masks. Data order has seeds of its own. The tracker `report_to` ("tensorboard", "wandb" ...) writes into
    `folder`.

    Raises:
        UserError: the tracker is unknown or not installed, the device cannot be used, or it lacks the precision.
    """
    _check_tracker(report_to)
    timeout = timedelta(seconds=machine.rank_timeout)
    _begin_again(machine.cpu, timeout)
    try:
        accelerator = Accelerator(
            mixed_precision=machine.mixed_precision,
            log_with=report_to,
            project_dir=folder,
            cpu=machine.cpu,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
            step_scheduler_with_optimizer=False,
        )
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from error
    except RuntimeError as error:
        if _DEVICE_VARIABLE not in os.environ:
            raise
        raise _unusable(os.environ[_DEVICE_VARIABLE], error) from error
    _refuse_lone_rank(accelerator)
    _refuse_other_engine(accelerator)
    _check_device(accelerator, machine.cpu)
    show_log(accelerator.is_main_process)
    use_threads(accelerator, machine.num_threads)
    if accelerator.device.type == "cpu":
        _keep_freed_memory()
    if accelerator.mixed_precision == "bf16" and accelerator.device.type == "cpu" and bf16_is_emulated():
        logger.info(
            "note: this processor (%s) has no bf16 arithmetic; mixed precision bf16 is emulated on it, and many times "
            "slower than no",
            torch.backends.cpu.get_cpu_capability(),
        )
    set_seed(seed, device_specific=True)
    return accelerator


def _begin_again(cpu: bool, timeout: timedelta) -> None:
    """Meet the other ranks under a name of its own, where torchrun has restarted them.

    Its store still holds the addresses of the ranks before, which a process group would take for those of these. Agents
    of several machines count restarts each by itself; there a new store is wanted (see the README).
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt == 0 or os.environ.get("GROUP_WORLD_SIZE") != "1" or torch.distributed.is_initialized():
        return
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
    torch.distributed.init_process_group(
        "gloo" if cpu or not torch.cuda.is_available() else "nccl",
        store=torch.distributed.PrefixStore(f"restart-{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


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
        raise UserError(f"--report-to {name}: it is not installed (python -m pip install {name.replace('_', '-')})")


def _refuse_lone_rank(accelerator: Accelerator) -> None:
    world = os.environ.get("WORLD_SIZE", "1")
    if accelerator.num_processes == 1 and world not in ("", "1"):
        raise UserError(
            f"WORLD_SIZE={world} says that so many processes work together, and each finds itself alone: all would do "
            "the same and write the same files. Without a GPU give --cpu, with which ranks talk over gloo; or start "
            "one process (unset WORLD_SIZE)"
        )


def _refuse_other_engine(accelerator: Accelerator) -> None:
    """The scripts train by DDP; without a GPU, accelerate would quietly do so where another engine is configured."""
    engines = {name: f"ACCELERATE_USE_{name}" for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM")}
    for name, variable in engines.items():
        if os.environ.get(variable, "").lower() == "true" or accelerator.distributed_type.value == name:
            raise UserError(
                f"{name} is configured ({variable}), and the scripts train by DDP: leave it out of the launcher's "
                "configuration. A loop of your own can give TrainStep a model sharded by fully_shard"
            )


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
    reason = reason_of(error)
    asked = os.environ.get(_DEVICE_VARIABLE)
    remedy = f"{_DEVICE_VARIABLE}={asked} asks for it; unset the variable"
    if not asked:
        remedy = "mend its driver, or give --cpu to work on the processor"
    return UserError(f"the device {device} cannot be used here ({reason}); {remedy}")


def _keep_freed_memory() -> None:
    """Have glibc keep the memory of large tensors for the next ones.

    By itself it gives blocks of 32 MiB and more back to the system when they are freed, and gets new ones that are
    cleared page by page: a fused pass of many copies then takes a quarter longer than its copies one by one. What is
    kept lies in pieces, so that the peak of the memory rises (by 7 % for ResNet44, 23 % for VGG16, M=8 fused).
    """
    if platform.libc_ver()[0] == "glibc" and _MMAP_VARIABLE not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def use_threads(accelerator: Accelerator, num_threads: int | None = None) -> int:
    """Give a process so many threads, by default every core it may use where it runs alone on a CPU.

    A number that the user chose by OMP_NUM_THREADS is kept. `accelerate launch` exports a 1 there for CPU runs, which
    would leave all cores but one asleep: under it a 1 is no choice. Returns the number of threads.
    """
    chosen = os.environ.get("OMP_NUM_THREADS")
    if chosen == "1" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # the launcher says its precision
        chosen = None
    alone = accelerator.num_processes == 1 and accelerator.device.type == "cpu"
    if num_threads is None and chosen is None and alone:
        num_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    return torch.get_num_threads()
