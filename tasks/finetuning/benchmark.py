"""The cost of Batch Augmentation in a Trainer, as ratios to a plain Trainer's updates measured in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import Trainer

from seqba.trainer import BatchAugmentationTrainer
from tasks.benchmark.options import BenchmarkOptions
from tasks.benchmark.ratios import Ratio, Row, compare_seconds
from tasks.benchmark.trainer import time_updates
from tasks.cli.options import option
from tasks.finetuning.config import SEQ2SEQ, TASKS, FinetuningConfig
from tasks.finetuning.data import load_splits
from tasks.finetuning.encoding import encode
from tasks.finetuning.generated import generate_model
from tasks.finetuning.model import collator_for

ROWS = ("plain", "fused")
_WARM_UP = 3  # updates of every `train` call that are not timed; the first asks the loss for its form


@dataclass(frozen=True)
class FinetuningBenchmark(BenchmarkOptions):
    """Options of the benchmark: it times updates of a task's generated model, with transformers' default settings."""

    task: str = option(SEQ2SEQ, "what the model is for", choices=TASKS)
    rows: list[str] = option(list(ROWS), "what is measured", choices=ROWS)
    batch_size: int = option(32, "B, samples of an update")
    updates: int = option(24, "updates in one timing")
    pairs: int = option(9, "timed pairs, A B A B")

    def __post_init__(self) -> None:
        self.check(batch_size=1)


class TrainerUpdates:
    """Updates of a plain Trainer, and of one with Batch Augmentation, on the same model and batches."""

    def __init__(self, config: FinetuningBenchmark) -> None:
        self._config = config
        settings = FinetuningConfig(cache_dir=config.cache_dir)
        splits, _ = load_splits(settings, config.task, 0)
        self._model, self._tokenizer = generate_model(config.task, config.cache_dir, 0)
        self._data, _ = encode(splits["train"], config.task, self._tokenizer, settings.max_length)

    def seconds(self, count: int, trainer_class: type[Trainer] = Trainer, **options: Any) -> float:
        """The seconds of `count` updates; `options` go to the trainer."""
        _, seconds = time_updates(
            trainer_class,
            count,
            self._config,
            warm_up=_WARM_UP,
            settings={"per_device_train_batch_size": self._config.batch_size, "logging_steps": 25},
            model=self._model,
            train_dataset=self._data,
            data_collator=collator_for(self._config.task, self._model, self._tokenizer),
            processing_class=self._tokenizer,
            **options,
        )
        return seconds


def plain(config: FinetuningBenchmark) -> list[Row]:
    """`BatchAugmentationTrainer` with M = 1 against `Trainer`."""
    ratio = _ratio(config, ba_m=1)
    return [ratio.row("an update with ba_m=1 over one of transformers' Trainer", "0.98 to 1.02")]


def fused(config: FinetuningBenchmark) -> list[Row]:
    """An update of M fused copies against one of `Trainer`, of the same B."""
    ratio = _ratio(config, ba_m=config.ba_m, copies_per_pass=config.ba_m)
    name = f"an update with fused ba_m={config.ba_m} over one of transformers' Trainer of the same B"
    return [ratio.row(name, f"at most {config.ba_m}.0")]


def _ratio(config: FinetuningBenchmark, *, ba_m: int, **options: Any) -> Ratio:
    updates, count = TrainerUpdates(config), max(1, config.updates // ba_m)
    return compare_seconds(
        lambda: updates.seconds(count, BatchAugmentationTrainer, ba_m=ba_m, **options) / count,
        lambda: updates.seconds(config.updates) / config.updates,
        pairs=config.pairs,
        warm_up=1,
    )


MEASUREMENTS: dict[str, Callable[[FinetuningBenchmark], list[Row]]] = {"plain": plain, "fused": fused}
