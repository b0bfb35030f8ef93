"""The time that a Trainer's updates take, without what `train` does before the first and after the last."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from transformers import Seq2SeqTrainingArguments, Trainer, TrainerCallback

from tasks.benchmark.ratios import wait_for_device


class _StepTimer(TrainerCallback):
    """Measures the `seconds` of a `train` call's updates after the first `warm_up` of them."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up, self.seconds, self._start = warm_up, 0.0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm_up and not self._start:
            wait_for_device()
            self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            wait_for_device()
            self.seconds = time.perf_counter() - self._start


def time_updates(
    trainer_class: type[Trainer], count: int, config: Any, *, warm_up: int, settings: dict[str, Any], **options: Any
) -> tuple[Any, float]:
    """A new Trainer of these options after `warm_up` updates and `count` more, and the seconds of the latter.

    Its training arguments are `settings`, what every measurement has, and `config`'s `mixed_precision` and `cpu`.
    """
    timer = _StepTimer(warm_up)
    with tempfile.TemporaryDirectory() as folder:
        args = Seq2SeqTrainingArguments(
            output_dir=folder,
            max_steps=warm_up + count,
            learning_rate=1e-5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=config.mixed_precision == "bf16",
            fp16=config.mixed_precision == "fp16",
            use_cpu=config.cpu,
            **settings,
        )
        trainer = trainer_class(args=args, callbacks=[timer], **options)
        trainer.train()
    return trainer, timer.seconds
