"""Reasons to end a run early: losses and weights that are not finite, and Ctrl-C or SIGTERM between updates."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from accelerate import PartialState
from accelerate.utils import reduce
from torch import nn

from tasks.cli.errors import RunError

_SHOWN = 16  # samples named
INTERRUPTED = 130  # the shell's exit code for a run ended by Ctrl-C


class NonFiniteError(RunError):
    """A loss, a gradient or a weight (`what`) is not finite; the last good checkpoint is kept.

    `sample_ids` are the samples that this rank gave to the update, by their numbers in the encoded training set.
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


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is set on some rank; one rank alone waits for no device."""
    if PartialState().num_processes == 1:
        return flag
    return bool(reduce(torch.tensor(int(flag), device=device), "sum"))


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that fills when Ctrl-C or SIGTERM arrives; a second Ctrl-C interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
