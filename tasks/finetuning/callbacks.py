"""A Trainer that stops when its loss is not finite, in place of training on with nan for hours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from tasks.cli.errors import RunError
from tasks.run.guards import has_finite_weights, on_any_rank

_REMEDY = "lower --learning_rate, lengthen --warmup_steps, or clip harder with --max_grad_norm"


class StopAtNonFinite(TrainerCallback):
    """Raises at the first logged loss that is not finite; earlier checkpoints stay.

    It needs `logging_nan_inf_filter=False`: by default the Trainer leaves such losses out of its log.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Look at a line of the log."""
        loss = float((logs or {}).get("loss", 0.0))
        if not math.isfinite(loss):
            raise RunError(
                f"update {state.global_step}: the mean loss of the last {args.logging_steps:g} updates is {loss}; "
                f"{_REMEDY}. Checkpoints in {args.output_dir} are kept"
            )


class StopAtSignal(TrainerCallback):
    """Saves a checkpoint and ends the training after the update in which some rank met Ctrl-C or SIGTERM.

    Args:
        received: of `tasks.run.guards.stop_signals`.
    """

    def __init__(self, received: Sequence[int]) -> None:
        self._received = received
        self.stopped = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look for a signal after an update."""
        if on_any_rank(bool(self._received), args.device):
            self.stopped = control.should_save = control.should_training_stop = True


@torch.no_grad()
def check_weights(trainer: Trainer) -> None:
    """Raise where a weight is not finite, before it is saved as the result."""
    if not has_finite_weights(trainer.accelerator.unwrap_model(trainer.model)):
        raise RunError(f"the trained weights are not finite, and are not saved; {_REMEDY}")
