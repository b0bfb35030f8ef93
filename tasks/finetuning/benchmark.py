"""What Batch Augmentation in a Trainer costs, as ratios to a plain Trainer's updates measured in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import Trainer, TrainingArguments

from seqba.trainer import BatchAugmentationTrainer
from tasks.benchmark.ratios import Row, compare_seconds
from tasks.benchmark.step_timer import StepTimer
from tasks.cli.errors import UserError
from tasks.cli.options import check_least
from tasks.finetuning.config import SEQ2SEQ, TASKS, FinetuningConfig
from tasks.finetuning.data import encode, load_splits
from tasks.finetuning.generated import generate_model
from tasks.finetuning.model import collator_for

ROWS = ("plain", "fused")
_WARM_UP = 3  # updates of every `train` call that are not timed; the first asks the loss for its form


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is timed: updates of the generated model of a task, by default of transformers' own settings."""

    task: str = field(default=SEQ2SEQ, metadata={"help": f"one of {', '.join(TASKS)}"})
    rows: list[str] = field(default_factory=lambda: list(ROWS), metadata={"help": f"of {', '.join(ROWS)}; all of them"})
    ba_m: int = field(default=4, metadata={"help": "M of the fused row"})
    batch_size: int = field(default=32, metadata={"help": "B, samples of an update"})
    updates: int = field(default=24, metadata={"help": "updates in one timing"})
    pairs: int = field(default=9, metadata={"help": "timed pairs, A B A B"})
    mixed_precision: str = field(default="no", metadata={"help": "no, bf16 or fp16, of all that is compared"})
    cache_dir: str = field(default="runs/cache", metadata={"help": "folder of the generated text's vocabulary"})
    cpu: bool = field(default=False, metadata={"help": "measure on the processor even where an accelerator is at hand"})

    def __post_init__(self) -> None:
        check_least(self, {"ba_m": 2, "batch_size": 1, "updates": 1, "pairs": 2})
        if wrong := [row for row in self.rows if row not in ROWS]:
            raise UserError(f"--rows must be of {', '.join(ROWS)}, got {', '.join(wrong)}")
        if self.task not in TASKS:
            raise UserError(f"--task must be one of {', '.join(TASKS)}, got {self.task}")

    def __str__(self) -> str:
        return f"options: {asdict(self)}"


class TrainerUpdates:
    """Updates of a plain Trainer, and of one with Batch Augmentation, on the same model and batches."""

    def __init__(self, config: BenchmarkConfig) -> None:
        self._config = config
        settings = FinetuningConfig(cache_dir=config.cache_dir)
        rows = load_splits(settings, config.task, 0).train
        self._model, self._tokenizer = generate_model(config.task, config.cache_dir, 0)
        self._data, _ = encode(rows, config.task, self._tokenizer, settings.max_length)

    def seconds(self, count: int, trainer_class: type[Trainer] = Trainer, **options: Any) -> float:
        """What `count` updates take; `options` go to the trainer."""
        config, timer = self._config, StepTimer(_WARM_UP)
        with tempfile.TemporaryDirectory() as folder:
            trainer_class(
                model=self._model,
                args=TrainingArguments(
                    output_dir=folder,
                    per_device_train_batch_size=config.batch_size,
                    max_steps=_WARM_UP + count,
                    learning_rate=1e-5,
                    logging_steps=25,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    bf16=config.mixed_precision == "bf16",
                    fp16=config.mixed_precision == "fp16",
                    use_cpu=config.cpu,
                ),
                train_dataset=self._data,
                data_collator=collator_for(config.task, self._model, self._tokenizer),
                processing_class=self._tokenizer,
                callbacks=[timer],
                **options,
            ).train()
        return timer.seconds


def plain(config: BenchmarkConfig) -> list[Row]:
    """`BatchAugmentationTrainer` with M = 1 against `Trainer`."""
    updates, count = TrainerUpdates(config), config.updates
    ratio = compare_seconds(
        lambda: updates.seconds(count, BatchAugmentationTrainer, ba_m=1),
        lambda: updates.seconds(count),
        pairs=config.pairs,
        warm_up=1,
    )
    return [Row("an update with ba_m=1 over one of transformers' Trainer", f"{ratio.median:.3f}", "0.98 to 1.02",
                str(ratio))]  # fmt: skip


def fused(config: BenchmarkConfig) -> list[Row]:
    """An update of M fused copies against one of `Trainer`, of the same B."""
    updates, num_copies = TrainerUpdates(config), config.ba_m
    count = max(1, config.updates // num_copies)
    ratio = compare_seconds(
        lambda: updates.seconds(count, BatchAugmentationTrainer, ba_m=num_copies, copies_per_pass=num_copies) / count,
        lambda: updates.seconds(config.updates) / config.updates,
        pairs=config.pairs,
        warm_up=1,
    )
    name = f"an update with fused ba_m={num_copies} over one of transformers' Trainer of the same B"
    return [Row(name, f"{ratio.median:.3f}", f"at most {num_copies}.0", str(ratio))]


MEASUREMENTS: dict[str, Callable[[BenchmarkConfig], list[Row]]] = {"plain": plain, "fused": fused}
