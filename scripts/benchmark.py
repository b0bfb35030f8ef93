"""Time what a task costs, as ratios in one run: python scripts/benchmark.py translation [--rows trainer bare ...]."""

import io
import os
import platform
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict

import accelerate
import torch
import transformers
from transformers import HfArgumentParser

from tasks.errors import explained
from tasks.machine import start_accelerator
from tasks.translation.benchmark.config import BenchmarkConfig
from tasks.translation.benchmark.table import MEASUREMENTS

TASKS = ("translation",)


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in (*TASKS, "-h", "--help"):
        sys.exit(f"error: name what to measure first: {', '.join(TASKS)}")
    with explained():
        parser = HfArgumentParser(BenchmarkConfig, allow_abbrev=False, description=__doc__)
        (config,) = parser.parse_args_into_dataclasses([x for x in sys.argv[1:] if x not in TASKS])
        measure(config)


def measure(config: BenchmarkConfig) -> None:
    """Print every row as soon as it is measured."""
    accelerator = start_accelerator(seed=0, mixed_precision=config.mixed_precision, cpu=config.cpu)
    on_gpu = accelerator.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"{platform.machine()} processor, {os.cpu_count()} cores"
    print(f"options: {asdict(config)}\nupdates of: {asdict(config.training())}")
    versions = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"
    )
    print(f"{device}; {torch.get_num_threads()} threads; {versions}\n", flush=True)
    for name in config.rows:
        said = io.StringIO()  # progress bars and the like would stand between the rows
        try:
            with redirect_stdout(said), redirect_stderr(said):
                rows = MEASUREMENTS[name](config)
        except BaseException:
            print(said.getvalue(), file=sys.stderr)
            raise
        print(*rows, sep="\n", flush=True)


if __name__ == "__main__":
    main()
