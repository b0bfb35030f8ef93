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
import tasks.language_modelling.benchmark as language_modelling
import tasks.vision.benchmark as vision
from tasks.cli.errors import UserError, explained
from tasks.cli.machine import MachineOptions, start_accelerator
from tasks.cli.options import OptionParser
from tasks.translation.benchmark import table as translation
from tasks.translation.benchmark.config import TranslationBenchmark

TASKS: dict[str, Any] = {
    "translation": (TranslationBenchmark, translation.MEASUREMENTS),
    "finetuning": (finetuning.FinetuningBenchmark, finetuning.MEASUREMENTS),
    "language-modelling": (language_modelling.LanguageModelBenchmark, language_modelling.MEASUREMENTS),
    "vision": (vision.VisionBenchmark, vision.MEASUREMENTS),
}


def main() -> None:
    with explained():
        name, *options = sys.argv[1:] or [""]
        if name in ("-h", "--help"):
            print(f"{__doc__}\nTasks: {', '.join(TASKS)}; each has a --help of its own.")
            return
        if name not in TASKS:
            raise UserError(f"name first what to measure, one of {', '.join(TASKS)}; each has a --help of its own")
        options_class, measurements = TASKS[name]
        parser = OptionParser(options_class, prog=f"benchmark.py {name}", allow_abbrev=False, description=__doc__)
        parser.parse_known_options(options)  # an unknown option is named first
        (config,) = parser.parse_args_into_dataclasses(options)
        measure(config, measurements)


def measure(config: Any, measurements: dict[str, Any]) -> None:
    """Print every row as soon as it is measured."""
    accelerator = start_accelerator(MachineOptions(config.mixed_precision, config.cpu, config.num_threads), seed=0)
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
