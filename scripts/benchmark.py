"""Time what Batch Augmentation costs, as ratios in one run: python scripts/benchmark.py [--ba-m 4 ...]."""

import platform
from dataclasses import asdict

import torch
from transformers import HfArgumentParser

from tasks.translation.benchmark import BenchmarkConfig, streams_over_plain


def main() -> None:
    (config,) = HfArgumentParser(BenchmarkConfig, allow_abbrev=False).parse_args_into_dataclasses()
    print(asdict(config))
    ratio = streams_over_plain(config)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu"
    print(f"{torch.get_num_threads()} threads, {device}, torch {torch.__version__}")
    print(f"update with per-copy streams over torch's own dropout: {ratio}")


if __name__ == "__main__":
    main()
