"""The update: M copies in passes of K, one denominator, one reduction of the gradients.

    g = 1/(sum of targets) * sum over ranks, batches, copies of grad nll(w, T_m(x_n), y_n)

The plan is one integer, the copies in a pass (`copies_per_pass`, K): M is fused, 1 accumulates one copy after
the other, K in between need not divide M. No plan changes the size of the gradient.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seqba.loss import count_targets
from seqba.random_state import rng_state, set_rng_state
from seqba.repeat import count_samples, largest_tensor, repeat_batch
from seqba.streams import copies_of_pass, copy_streams

logger = logging.getLogger(__name__)

CopiesPerPass = int | Literal["auto"]


def plan_passes(copies: Sequence[int], copies_per_pass: int) -> list[tuple[int, ...]]:
    """Cut the copies of an update into passes of at most K.

    >>> plan_passes(range(4), 3)
    [(0, 1, 2), (3,)]
    """
    if not 1 <= copies_per_pass <= len(copies):
        raise ValueError(
            f"copies_per_pass must be from 1 to the number of copies, {len(copies)}, got {copies_per_pass}"
        )
    return [tuple(copies[i : i + copies_per_pass]) for i in range(0, len(copies), copies_per_pass)]


def take_repeated(batch: Any, copies: tuple[int, ...]) -> Any:
    """The rows of a pass where the copies part inside the network: the batch, repeated copy-major."""
    return repeat_batch(batch, len(copies))


@dataclass(frozen=True)
class UpdateResult:
    """What an update measured: 0-dim tensors on the device, so that nothing waits for them here.

    Attributes:
        loss: this rank's part of the loss; the sum over ranks is the update's loss in nats per target.
        grad_norm: L2 norm of the whole gradient before clipping; the same on every rank.
        num_targets: the denominator: target tokens (or samples) of all ranks, every copy counted.
        num_samples: samples of all ranks, each counted once.
        copies_per_pass: the K that was used.
    """

    loss: Tensor
    grad_norm: Tensor
    num_targets: Tensor
    num_samples: Tensor
    copies_per_pass: int


class TrainStep:
    """One optimizer update on the mean loss over every target of every copy, pass, batch and rank.

    Args:
        accelerator: with `gradient_accumulation_steps` 1: the batches of an update are given to the step.
        model: as `accelerator.prepare` returned it.
        optimizer: as `accelerator.prepare` returned it.
        loss_fn: (model, rows) -> the loss summed over the rows' targets, 0-dim.
        num_copies: M.
        copies_per_pass: K from 1 to M, or "auto": start at M, and on out-of-memory halve K and do the same update
            again from the state it began with (generators, buffers, gradients), so that the result is bitwise
            that of having started there. The smaller K is kept, and said once through `logging`. With several ranks
            they agree on K before any gradient is reduced: an update larger than any before it is tried
            without reduction first.
        max_norm: clip the gradient to this L2 norm; None leaves it.
        copy_seed: where given, every copy draws from its own stream of (seed, update, shard, copy): `copy_streams`.
            None leaves dropout to torch's own generators.
        count_fn: rows -> the number of targets, by default labels other than -100.
        take_copies: (batch, copies) -> the rows of one pass, by default the batch repeated `len(copies)` times.

    Raises:
        ValueError: `num_copies` or `copies_per_pass` out of range, `max_norm` not positive, or an accelerator that
            divides losses itself.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        num_copies: int = 1,
        copies_per_pass: CopiesPerPass = "auto",
        max_norm: float | None = None,
        copy_seed: int | None = None,
        count_fn: Callable[[Any], Tensor] | None = None,
        take_copies: Callable[[Any, tuple[int, ...]], Any] = take_repeated,
    ) -> None:
        if num_copies < 1:
            raise ValueError(f"num_copies must be at least 1, got {num_copies}")
        if copies_per_pass != "auto":
            plan_passes(range(num_copies), copies_per_pass)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}; None switches clipping off")
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "the accelerator divides losses by its gradient_accumulation_steps, "
                f"{accelerator.gradient_accumulation_steps}; build it with 1 and give all batches of an update to the "
                "step, which divides once"
            )
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.loss_fn, self.count_fn, self.take_copies = loss_fn, count_fn or _count_labels, take_copies
        self.copies = tuple(range(num_copies))
        self.max_norm, self.copy_seed = max_norm, copy_seed
        self.is_auto = copies_per_pass == "auto"
        self.copies_per_pass = num_copies if copies_per_pass == "auto" else copies_per_pass
        self._tried: list[tuple[int, int]] = []  # sizes of batches that fitted on all ranks, where there are several

    def __call__(self, batches: Sequence[Any], *, update: int) -> UpdateResult:
        """Do update number `update` on this rank's batches of B samples each (several: accumulation).

        Batches are unrepeated and on the device. Every rank must give the same number of them.
        """
        targets = sum(torch.as_tensor(self.count_fn(batch)).to(self.accelerator.device) for batch in batches)
        samples = sum(count_samples(batch) or 0 for batch in batches)
        is_new = self._may_shrink() and any(not self._was_tried(largest_tensor(batch)) for batch in batches)
        local = torch.tensor([0, samples, int(is_new)], device=self.accelerator.device)
        local[0] = targets * len(self.copies)
        num_targets, num_samples, ranks_to_try = self.accelerator.reduce(local, "sum").unbind()
        denominator = num_targets.clamp(min=1)

        if self._may_shrink() and self._has_ranks() and bool(ranks_to_try):
            self._try_on_all_ranks(batches, update, denominator)
            self._tried += [size for size in map(largest_tensor, batches) if not self._was_tried(size)]
        loss = self._fit(batches, update, denominator)
        grad_norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return UpdateResult(loss, grad_norm, num_targets, num_samples, self.copies_per_pass)

    def state_dict(self) -> dict[str, Any]:
        """The copies in a pass that "auto" has come to, so that a resumed run goes on with them."""
        return {"copies_per_pass": self.copies_per_pass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the plan of `state`, where this one may change by itself."""
        if self.is_auto:
            self.copies_per_pass = min(int(state["copies_per_pass"]), len(self.copies))

    def _accumulate(self, batches: Sequence[Any], update: int, denominator: Tensor, *, reduce: bool = True) -> Tensor:
        """All passes of the update; gradients are reduced over ranks in the last one only."""
        loss = torch.zeros((), device=self.accelerator.device)
        first_shard = self.accelerator.process_index * len(batches)
        passes = [(i, copies) for i in range(len(batches)) for copies in self._passes()]
        for number, (i, copies) in enumerate(passes):
            is_last = number == len(passes) - 1
            sync = nullcontext() if is_last and reduce else self.accelerator.no_sync(self.model)
            with sync, self._copies(batches[i], copies, update, first_shard + i):
                nll = self.loss_fn(self.model, self.take_copies(batches[i], copies)) / denominator
                # ranks average their gradients; the sum over them is wanted
                self.accelerator.backward(nll * self.accelerator.num_processes)
            loss += nll.detach()
        return loss

    def _passes(self) -> list[tuple[int, ...]]:
        return plan_passes(self.copies, self.copies_per_pass)

    def _copies(self, batch: Any, copies: tuple[int, ...], update: int, shard: int) -> AbstractContextManager[None]:
        if self.copy_seed is None:
            return copies_of_pass(copies)
        samples = count_samples(batch)
        return copy_streams(copies, seed=self.copy_seed, update=update, shard=shard, num_samples=samples)

    def _fit(self, batches: Sequence[Any], update: int, denominator: Tensor) -> Tensor:
        """The update's passes; alone and with "auto", with as many copies a pass as memory holds."""
        if not self._may_shrink() or self._has_ranks():
            return self._accumulate(batches, update, denominator)
        start = _State.of(self.model)
        while (loss := self._attempt(batches, update, denominator)) is None:
            self._halve(start)
        return loss

    def _try_on_all_ranks(self, batches: Sequence[Any], update: int, denominator: Tensor) -> None:
        """Find a K that fits everywhere, by doing the passes without reducing gradients; then undo them."""
        start = _State.of(self.model)
        while True:
            failed = self._attempt(batches, update, denominator, reduce=False) is None
            anywhere = self.accelerator.reduce(torch.tensor(int(failed), device=self.accelerator.device), "sum")
            if not bool(anywhere):
                start.restore(self.model)
                return
            self._halve(start)

    def _attempt(
        self, batches: Sequence[Any], update: int, denominator: Tensor, *, reduce: bool = True
    ) -> Tensor | None:
        """The loss, or None where memory ran out. The exception is gone on return, and what it kept alive."""
        try:
            return self._accumulate(batches, update, denominator, reduce=reduce)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            if self.copies_per_pass == 1 and not self._has_ranks():
                raise
        return None

    def _halve(self, start: "_State") -> None:
        if self.copies_per_pass == 1:
            raise torch.OutOfMemoryError(
                "out of memory on some rank with one copy a pass, the smallest plan; give each batch fewer samples"
            )
        start.restore(self.model)
        clear_device_cache(garbage_collection=True)
        before, self.copies_per_pass = self.copies_per_pass, self.copies_per_pass // 2
        logger.warning(
            "out of memory with %d copies in a pass; this update is done again, and the run goes on, with %d",
            before,
            self.copies_per_pass,
        )

    def _clip(self) -> Tensor:
        """The gradient's L2 norm before clipping, unscaled once and for all copies (fp16)."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.max_norm is not None:
            return self.accelerator.clip_grad_norm_(parameters, self.max_norm)
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _was_tried(self, size: tuple[int, int]) -> bool:
        """Whether a batch at least as large in both numbers and longest side has fitted."""
        return any(size[0] <= numbers and size[1] <= side for numbers, side in self._tried)

    def _may_shrink(self) -> bool:
        return self.is_auto and self.copies_per_pass > 1

    def _has_ranks(self) -> bool:
        return self.accelerator.num_processes > 1


@dataclass(frozen=True)
class _State:
    """What passes change before the optimizer moves: gradients, buffers, generators."""

    gradients: list[Tensor | None]
    buffers: list[Tensor]
    generators: dict[str, Any]
    syncs_buffers: bool | None

    @classmethod
    def of(cls, model: nn.Module) -> "_State":
        return cls(
            [None if p.grad is None else p.grad.clone() for p in model.parameters()],
            [b.clone() for b in model.buffers()],
            rng_state(),
            getattr(model, "require_forward_param_sync", None),
        )

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        for parameter, gradient in zip(model.parameters(), self.gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        for buffer, value in zip(model.buffers(), self.buffers, strict=True):
            buffer.copy_(value)
        set_rng_state(self.generators)
        if self.syncs_buffers is not None:
            # DDP broadcasts buffers in the first forward pass of an update: a rank that failed in it must
            # do so again together with those that did not
            model.require_forward_param_sync = self.syncs_buffers  # type: ignore[assignment]


def _is_out_of_memory(error: RuntimeError) -> bool:
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return True
    return should_reduce_batch_size(error)


def _count_labels(batch: Any) -> Tensor:
    return count_targets(batch["labels"])
