"""The time that a Trainer's updates take, without what `train` does before the first and after the last."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerCallback

from tasks.benchmark.ratios import wait_for_device


class StepTimer(TrainerCallback):
    """Times the updates of a `train` call after the first `warm_up` of them.

    Attributes:
        seconds: theirs, once training has ended.
    """

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up
        self.seconds = 0.0
        self._start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count behind the warm-up."""
        if state.global_step == self.warm_up and not self._start:
            wait_for_device()
            self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop with the last update."""
        if state.global_step == state.max_steps:
            wait_for_device()
            self.seconds = time.perf_counter() - self._start
