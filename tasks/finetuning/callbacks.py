"""A Trainer that stops when its loss is not finite, in place of training on with nan for hours."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from tasks.cli.errors import RunError
from tasks.run.guards import has_finite_weights

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


@torch.no_grad()
def check_weights(trainer: Trainer) -> None:
    """Raise where a weight is not finite, before it is saved as the result."""
    if not has_finite_weights(trainer.accelerator.unwrap_model(trainer.model)):
        raise RunError(f"the trained weights are not finite, and are not saved; {_REMEDY}")
