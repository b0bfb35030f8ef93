"""The nats of every token of a text under a model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator

from tasks.decoding.mc_dropout import dropout_on
from tasks.language_modelling.evaluation.model import CausalModel
from tasks.language_modelling.evaluation.tokens import Tokens
from tasks.language_modelling.evaluation.windows import Windows


@torch.inference_mode()
def score_tokens(
    accelerator: Accelerator,
    model: CausalModel,
    tokens: Tokens,
    windows: Windows,
    *,
    batch_size: int = 1,
    num_masks: int = 0,
) -> npt.NDArray[np.float64]:
    """-log p of each token, (N,), in nats.

    With N dropout masks p is the mean of their probabilities, of each token (Gal and Ghahramani 2016, "Dropout as a
    Bayesian Approximation"):

        p(y_t | y_<t) = 1/N * sum_n p_n(y_t | y_<t)

    Each mask is a pass of its own, with a state of its own through the text where the model carries one. Draws come
    from torch's global generator, anew in each batch of windows, and LayerDrop stays off, as in the translation task.
    The batches of a model without a state are shared out among the ranks.

    Args:
        accelerator: precision, device and ranks.
        model: on the accelerator's device.
        tokens: what is scored.
        windows: `carried_windows` of a recurrent model (`batch_size` is 1 then), else `overlapping_windows`.
        batch_size: windows of a pass.
        num_masks: N; 0 for none.
    """
    sequence = np.concatenate([[tokens.first], tokens.ids])
    found = torch.zeros(len(tokens.ids), dtype=torch.float64)
    num_passes = max(1, num_masks)
    states: list[Any] = [None] * num_passes
    is_shared = accelerator.num_processes > 1 and not model.is_recurrent
    rank, num_ranks = (accelerator.process_index, accelerator.num_processes) if is_shared else (0, 1)
    with dropout_on(model.model) if num_masks else nullcontext():
        for scored, input_ids, labels in islice(windows.batches(sequence, batch_size), rank, None, num_ranks):
            input_ids, labels = input_ids.to(accelerator.device), labels.to(accelerator.device)
            log_probabilities = []
            for n in range(num_passes):
                with accelerator.autocast():
                    nats, states[n] = model.nats(input_ids, labels, states[n])
                log_probabilities.append(-nats.double())
            found[scored] = math.log(num_passes) - torch.stack(log_probabilities).logsumexp(0).cpu()
    if is_shared:
        found = accelerator.reduce(found.to(accelerator.device), "sum").cpu()
    return found.numpy()
