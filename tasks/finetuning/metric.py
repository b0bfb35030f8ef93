"""Figures of an evaluation besides the Trainer's `eval_loss`: sums over all targets, divided once.

That loss is, by model and number of ranks, a mean of the batches' means, or of another count of targets.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import EvalPrediction

from seqba.loss import IGNORE_INDEX
from tasks.finetuning.config import CAUSAL, CLASSIFICATION


def metrics_for(task: str) -> dict[str, Any]:
    """`preprocess_logits_for_metrics` and `compute_metrics`, arguments of a Trainer.

    The first reduces the logits of a batch to two numbers a row, (B, 2), so that no logits are kept; the second sums
    them: `nats_per_token` and `perplexity` of texts, `accuracy` (0 to 1) of classes.
    """
    if task == CLASSIFICATION:
        return {"preprocess_logits_for_metrics": correct_per_row, "compute_metrics": accuracy}
    nats_per_row = partial(token_nats_per_row, is_causal=task == CAUSAL)
    return {"preprocess_logits_for_metrics": nats_per_row, "compute_metrics": perplexity}


def token_nats_per_row(logits: Any, labels: Tensor, *, is_causal: bool) -> Tensor:
    """(B, T, V), (B, T) -> (B, 2): summed nats of a row's targets, and how many they are.

    A causal model's logits at a position are for the next label.
    """
    logits = _with_rows(logits)
    if is_causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    nats = torch.nn.functional.cross_entropy(
        logits.float().transpose(1, 2), labels, reduction="none", ignore_index=IGNORE_INDEX
    )
    return torch.stack([nats.sum(1), (labels != IGNORE_INDEX).sum(1).to(nats)], dim=1)


def _with_rows(outputs: Any) -> Tensor:
    """The logits: alone, or first among the outputs but for an auxiliary loss, a single number (Mixtral)."""
    if isinstance(outputs, Tensor):
        return outputs
    logits: Tensor = next(x for x in outputs if isinstance(x, Tensor) and x.ndim > 1)
    return logits


def perplexity(prediction: EvalPrediction) -> dict[str, float]:
    """exp of the mean nats of all targets."""
    nats, targets = prediction.predictions.sum(axis=0, dtype=float)
    mean = nats / targets if targets else math.nan
    return {"nats_per_token": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf}


def correct_per_row(logits: Any, labels: Tensor) -> Tensor:
    """(B, C), (B,) -> (B, 2): 1 where the highest logit is the label's, and 1."""
    logits = _with_rows(logits)
    correct = logits.argmax(-1) == labels
    return torch.stack([correct, torch.ones_like(correct)], dim=1).float()


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """The share of samples whose class is right."""
    correct, samples = prediction.predictions.sum(axis=0, dtype=float)
    return {"accuracy": correct / samples}
