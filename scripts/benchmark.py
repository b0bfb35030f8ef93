"""Measure what a task costs, relatively: python scripts/benchmark.py translation [--rows trainer bare ...]."""

import io
import os
import platform
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import accelerate
import torch
import transformers

import tasks.finetuning.benchmark as finetuning
from tasks.cli.errors import UserError, explained
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.cli.options import OptionParser
from tasks.translation.benchmark import table as translation

TASKS: dict[str, Any] = {"translation": translation, "finetuning": finetuning}


def main() -> None:
    with explained():
        names = [argument for argument in sys.argv[1:] if argument in TASKS]
        if not names and {"-h", "--help"} & set(sys.argv):
            print(f"{__doc__}\nTasks: {', '.join(TASKS)}; each has a --help of its own.")
            return
        if len(names) != 1:
            raise UserError(f"name what to measure, one of {', '.join(TASKS)}; each has a --help of its own")
        task = TASKS[names[0]]
        parser = OptionParser(task.BenchmarkConfig, allow_abbrev=False, description=__doc__)
        (config,) = parser.parse_args_into_dataclasses([x for x in sys.argv[1:] if x not in TASKS])
        measure(config, task.MEASUREMENTS)


def measure(config: Any, measurements: dict[str, Any]) -> None:
    """Print every row as soon as it is measured."""
    accelerator = start_accelerator(MachineOptions(config.mixed_precision, config.cpu), seed=0)
    on_gpu = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} processor, {os.cpu_count()} cores"
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    print(f"{config}\n{device}; {torch.get_num_threads()} threads; {versions}\n", flush=True)
    for name in config.rows:
        said = io.StringIO()  # progress bars and the like would stand between the rows
        try:
            with redirect_stdout(said), redirect_stderr(said):
                rows = measurements[name](config)
        except BaseException:
            print(said.getvalue(), file=sys.stderr)
            raise
        print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
