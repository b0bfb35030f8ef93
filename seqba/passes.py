"""The plan of an update: M copies in passes of K, and finding the largest K that memory holds.

M is fused (`copies_per_pass` M), 1 accumulates one copy after the other, K in between need not divide M. "auto"
starts at M and halves on out-of-memory. Whatever runs a pass (`TrainStep`, the Trainer) stands on this one file.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn

from seqba.draws.generators import rng_state, set_rng_state
from seqba.repeat import largest_tensor

logger = logging.getLogger(__name__)

CopiesPerPass = int | Literal["auto"]
ResultT = TypeVar("ResultT")


def plan_passes(copies: Sequence[int], copies_per_pass: int) -> list[tuple[int, ...]]:
    """Cut the copies of an update into passes of at most K.

    >>> plan_passes(range(4), 3)
    [(0, 1, 2), (3,)]

    Raises:
        ValueError: K is no integer from 1 to the number of copies.
    """
    if isinstance(copies_per_pass, bool) or not isinstance(copies_per_pass, int):
        raise ValueError(f"copies_per_pass must be auto or a whole number, got {copies_per_pass!r}")
    if not 1 <= copies_per_pass <= len(copies):
        raise ValueError(
            f"copies_per_pass must be from 1 to the number of copies, {len(copies)}, got {copies_per_pass}"
        )
    return [tuple(copies[i : i + copies_per_pass]) for i in range(0, len(copies), copies_per_pass)]


class CopyPlan:
    """How many copies stand in a pass, and the halving of that number when memory runs out.

    Args:
        num_copies: M.
        copies_per_pass: K from 1 to M, or "auto": start at M, and on out-of-memory halve K and do the same passes
            again from the state they began with (generators, buffers, gradients), so that the result is bitwise
            that of having started there. The smaller K is kept, and said once through `logging`. With several ranks
            they agree on K before any gradient is reduced: batches larger than any before them are tried without
            reduction first.

    Raises:
        ValueError: `num_copies` or `copies_per_pass` out of range.
    """

    def __init__(self, num_copies: int, copies_per_pass: CopiesPerPass) -> None:
        if num_copies < 1:
            raise ValueError(f"num_copies must be at least 1, got {num_copies}")
        if copies_per_pass != "auto":
            plan_passes(range(num_copies), copies_per_pass)
        self.copies = tuple(range(num_copies))
        self.is_auto = copies_per_pass == "auto"
        self.copies_per_pass = num_copies if copies_per_pass == "auto" else copies_per_pass
        self._tried: list[tuple[int, int]] = []  # sizes of batches that fitted on all ranks, where there are several
        self._beside: list[tuple[int, int]] = []  # and that fitted beside the gradients of earlier batches

    @property
    def passes(self) -> list[tuple[int, ...]]:
        """The copies of each pass, in order."""
        return plan_passes(self.copies, self.copies_per_pass)

    @property
    def may_shrink(self) -> bool:
        """Whether out-of-memory would halve K."""
        return self.is_auto and self.copies_per_pass > 1

    def is_larger_than_tried(self, batch: Any) -> bool:
        """Whether no batch at least as large in both its numbers and its longest side has fitted yet."""
        return _is_larger(batch, self._tried)

    def run(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: Sequence[Any],
        attempt: Callable[[bool], ResultT],
        *,
        try_first: bool,
    ) -> ResultT:
        """Do the passes over `batches`, with as many copies in each as memory holds.

        Args:
            accelerator: names the ranks and the device.
            model: whose gradients and buffers the passes change.
            batches: what the passes run over, unrepeated.
            attempt: does all of `passes`; its argument says whether ranks reduce their gradients at the end.
            try_first: with several ranks, find a K that fits all of them before any of them reduces. Must be the
                same on every rank: whether `is_larger_than_tried` holds for a batch of any of them.
        """
        has_ranks = accelerator.num_processes > 1
        if not self.may_shrink:
            return attempt(True)
        if has_ranks:
            if try_first:
                self._try_on_all_ranks(accelerator, model, attempt)
                self._tried += [largest_tensor(batch) for batch in batches if self.is_larger_than_tried(batch)]
            return attempt(True)
        beside = any(parameter.grad is not None for parameter in model.parameters())
        larger = [batch for batch in batches if _is_larger(batch, self._beside)]
        if beside and not larger:
            return attempt(True)  # it fits, and keeping a copy of the gradients would cost as much memory again
        start = PassState.of(model)
        while (fitted := self._attempt(attempt, reduce=True, must_fit=self.copies_per_pass == 1)) is None:
            self._halve(model, start)
        if beside:
            self._beside += [largest_tensor(batch) for batch in larger]
        return fitted[0]

    def state_dict(self) -> dict[str, Any]:
        """The copies in a pass that "auto" has come to, so that a resumed run goes on with them."""
        return {"copies_per_pass": self.copies_per_pass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the plan of `state`, where this one may change by itself."""
        if self.is_auto:
            self.copies_per_pass = min(int(state["copies_per_pass"]), len(self.copies))

    def _try_on_all_ranks(self, accelerator: Accelerator, model: nn.Module, attempt: Callable[[bool], Any]) -> None:
        """Find a K that fits everywhere, by doing the passes without reducing gradients; then undo them."""
        start = PassState.of(model)
        while True:
            failed = self._attempt(attempt, reduce=False, must_fit=False) is None
            anywhere: Tensor = accelerator.reduce(torch.tensor(int(failed), device=accelerator.device), "sum")
            if not bool(anywhere):
                start.restore(model)
                return
            self._halve(model, start)

    def _attempt(self, attempt: Callable[[bool], ResultT], *, reduce: bool, must_fit: bool) -> tuple[ResultT] | None:
        """The result, or None where memory ran out. The exception is gone on return, and what it kept alive."""
        try:
            return (attempt(reduce),)
        except RuntimeError as error:
            if must_fit or not is_out_of_memory(error):
                raise
        return None

    def _halve(self, model: nn.Module, start: "PassState") -> None:
        if self.copies_per_pass == 1:
            raise torch.OutOfMemoryError(
                "one copy a pass, the smallest plan, is out of memory. Some rank could not hold it; give each batch "
                "fewer samples"
            )
        start.restore(model)
        clear_device_cache(garbage_collection=True)
        before, self.copies_per_pass = self.copies_per_pass, self.copies_per_pass // 2
        logger.warning(
            "out of memory with %d copies in a pass; this update is done again, and the run goes on, with %d",
            before,
            self.copies_per_pass,
        )


def _is_larger(batch: Any, sizes: Sequence[tuple[int, int]]) -> bool:
    size = largest_tensor(batch)
    return not any(size[0] <= numbers and size[1] <= side for numbers, side in sizes)


@dataclass(frozen=True)
class PassState:
    """What passes change before the optimizer moves: gradients, buffers, generators."""

    gradients: list[Tensor | None]
    buffers: list[Tensor]
    generators: dict[str, Any]
    syncs_buffers: bool | None

    @classmethod
    def of(cls, model: nn.Module) -> "PassState":
        """The state now, copied."""
        return cls(
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [b.clone() for b in model.buffers()],
            rng_state(),
            getattr(model, "require_forward_param_sync", None),
        )

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Set `model` and the generators back to it."""
        for parameter, gradient in zip(model.parameters(), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        for buffer, value in zip(model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)
        set_rng_state(self.generators)
        if self.syncs_buffers is not None:
            # DDP broadcasts buffers in the first forward pass of an update: a rank that failed in it must
            # do so again together with those that did not
            model.require_forward_param_sync = self.syncs_buffers  # type: ignore[assignment]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return True
    return should_reduce_batch_size(error)
