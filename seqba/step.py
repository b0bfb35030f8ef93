"""The update: M copies in passes of K, one denominator, one reduction of the gradients.

    g = 1/(sum of targets) * sum over ranks, batches, copies of grad nll(w, T_m(x_n), y_n)

The plan is one integer, the copies in a pass (`copies_per_pass`, K): M is fused, 1 accumulates one copy after
the other, K in between need not divide M. No plan changes the size of the gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seqba.draws.streams import copies_of_pass, copy_streams
from seqba.loss import count_targets
from seqba.passes import CopiesPerPass, CopyPlan
from seqba.passes import plan_passes as plan_passes
from seqba.repeat import count_samples, repeat_batch


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
        self.plan = CopyPlan(num_copies, copies_per_pass)
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
        self.max_norm, self.copy_seed = max_norm, copy_seed

    def __call__(self, batches: Sequence[Any], *, update: int) -> UpdateResult:
        """Do update number `update` on this rank's batches of B samples each (several: accumulation).

        Batches are unrepeated and on the device. Every rank must give the same number of them.
        """
        targets = sum(torch.as_tensor(self.count_fn(batch)).to(self.accelerator.device) for batch in batches)
        samples = sum(count_samples(batch) or 0 for batch in batches)
        is_new = self.plan.may_shrink and any(self.plan.is_larger_than_tried(batch) for batch in batches)
        local = torch.tensor([0, samples, int(is_new)], device=self.accelerator.device)
        local[0] = targets * len(self.plan.copies)
        num_targets, num_samples, ranks_to_try = self.accelerator.reduce(local, "sum").unbind()
        denominator = num_targets.clamp(min=1)

        try_first = self.plan.may_shrink and self.accelerator.num_processes > 1 and bool(ranks_to_try)
        loss = self.plan.run(
            self.accelerator,
            self.model,
            batches,
            lambda reduce: self._accumulate(batches, update, denominator, reduce=reduce),
            try_first=try_first,
        )
        grad_norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return UpdateResult(loss, grad_norm, num_targets, num_samples, self.plan.copies_per_pass)

    def state_dict(self) -> dict[str, Any]:
        """The copies in a pass that "auto" has come to, so that a resumed run goes on with them."""
        return self.plan.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the plan of `state`, where this one may change by itself."""
        self.plan.load_state_dict(state)

    def _accumulate(self, batches: Sequence[Any], update: int, denominator: Tensor, *, reduce: bool = True) -> Tensor:
        """All passes of the update; gradients are reduced over ranks in the last one only."""
        loss = torch.zeros((), device=self.accelerator.device)
        first_shard = self.accelerator.process_index * len(batches)
        passes = [(i, copies) for i in range(len(batches)) for copies in self.plan.passes]
        for number, (i, copies) in enumerate(passes):
            is_last = number == len(passes) - 1
            sync = nullcontext() if is_last and reduce else self.accelerator.no_sync(self.model)
            with sync, self._copies(batches[i], copies, update, first_shard + i):
                nll = self.loss_fn(self.model, self.take_copies(batches[i], copies)) / denominator
                # ranks average their gradients; the sum over them is wanted
                self.accelerator.backward(nll * self.accelerator.num_processes)
            loss += nll.detach()
        return loss

    def _copies(self, batch: Any, copies: tuple[int, ...], update: int, shard: int) -> AbstractContextManager[None]:
        if self.copy_seed is None:
            return copies_of_pass(copies)
        samples = count_samples(batch)
        return copy_streams(copies, seed=self.copy_seed, update=update, shard=shard, num_samples=samples)

    def _clip(self) -> Tensor:
        """The gradient's L2 norm before clipping, unscaled once and for all copies (fp16)."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.max_norm is not None:
            return self.accelerator.clip_grad_norm_(parameters, self.max_norm)
        self.accelerator.unscale_gradients()
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _count_labels(batch: Any) -> Tensor:
    return count_targets(batch["labels"])
