"""Losses and weights that are nan or infinite: found before they are saved, and told with what led to them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tasks.errors import RunError

_SHOWN = 16  # samples named


class NonFiniteError(RunError):
    """A loss, a gradient or a weight is not finite; the last good checkpoint is kept.

    Args:
        what: the value and its update.
        sample_ids: numbers of the samples that this rank gave to the update, in the encoded training set.
        rank: this rank.
        checkpoint: the newest good checkpoint, or None where there is none.
    """

    def __init__(self, what: str, *, sample_ids: Sequence[int], rank: int, checkpoint: Path | None) -> None:
        ids = ", ".join(map(str, sample_ids[:_SHOWN])) + (" ..." if len(sample_ids) > _SHOWN else "")
        kept = f"The last good checkpoint is {checkpoint}" if checkpoint else "No checkpoint was written yet"
        super().__init__(
            f"{what}; samples {ids} of the training set (rank {rank}). {kept}; look at these samples, lower the "
            "learning rate, clip the gradient, or train in fp32"
        )


def has_finite_weights(model: nn.Module) -> bool:
    """Whether no parameter of the model is nan or infinite; waits for the device once."""
    return bool(torch.stack([parameter.detach().isfinite().all() for parameter in model.parameters()]).all())
