"""The update: M copies in passes of K, one denominator, one reduction of the gradients.

    g = 1/(sum of targets) * sum over ranks, batches, copies of grad nll(w, T_m(x_n), y_n)

The plan is one integer, the copies in a pass (`copies_per_pass`, K): M is fused, 1 accumulates one copy after
the other, K in between need not divide M. No plan changes the size of the gradient.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from seqba.analysis.live import PassNorms, noise_of_halves, pick_rows
from seqba.carried import CarriedState
from seqba.groups import CopyGroup
from seqba.passes import CopiesPerPass, CopyPlan, Pass, PassLoop
from seqba.repeat import count_samples, repeat_batch


def take_repeated(batch: Any, copies: tuple[int, ...]) -> Any:
    """The rows of a pass where the copies part inside the network: the batch, repeated copy-major."""
    return repeat_batch(batch, len(copies))


@dataclass(frozen=True)
class UpdateResult:
    """The figures of an update, over all ranks: 0-dim tensors on the device, so that nothing waits for them here.

    Attributes:
        loss: the loss, per target.
        grad_norm: L2 norm of the whole gradient before clipping.
        num_targets: the denominator: target tokens (or samples), every copy counted.
        num_samples: samples, each counted once.
        copies_per_pass: the K that was used.
        noise_within, noise_between: s_w^2 and s_b^2 of `seqba.analysis`, for gradients of the mean loss per target,
            of the first batch of the update, the mean over the ranks; None where it was not measured.
    """

    loss: Tensor
    grad_norm: Tensor
    num_targets: Tensor
    num_samples: Tensor
    copies_per_pass: int
    noise_within: Tensor | None = None
    noise_between: Tensor | None = None


def _seed_of_first_rank(accelerator: Accelerator) -> int:
    seed = torch.tensor(torch.initial_seed() & ((1 << 62) - 1), device=accelerator.device)
    return int(broadcast(seed))


class TrainStep:
    """One optimizer update on the mean loss over every target of every copy, pass, batch and rank.

    Args:
        accelerator: with `gradient_accumulation_steps` 1: the batches of an update are given to the step.
        model: as `accelerator.prepare` returned it.
        optimizer: as `accelerator.prepare` returned it.
        loss_fn: (model, rows) -> the loss summed over the rows' targets, 0-dim.
        count_fn: batch -> the number of those targets, a whole number, such as `count_targets(batch["labels"])`. A
            causal model predicts label t+1 at position t, so it has one target a row fewer:
            `count_targets(batch["labels"][:, 1:])`. It is asked once for each batch, unrepeated, and every copy is
            taken to have as many.
        num_copies: M.
        copies_per_pass: K from 1 to M, or "auto": start at M, and on out-of-memory halve K and do the same update
            again from the state it began with (`seqba.passes.PassLoop`); of a sharded model it stays at M.
        ranks_per_group: R; so many consecutive ranks must be given the same batches, and share their copies. Above 1
            and without `copy_seed`, torch's generators are seeded for each pass from the first rank's seed and (update,
            shard, first copy): no two ranks draw the same masks, whatever they were seeded with.
        reduce_every_pass: reduce the gradients in each pass, and not in the last alone: the same update, with sharded
            gradients under FSDP2 and more traffic under DDP. By default where `model` is sharded by `fully_shard`.
        max_norm: clip the gradient to this L2 norm; None leaves it.
        copy_seed: where given, every copy draws from its own stream of (seed, update, shard, copy): `copy_streams`.
            None leaves dropout to torch's own generators.
        take_copies: (batch, copies) -> the rows of one pass, by default the batch repeated `len(copies)` times. Each
            copy must have the targets that `count_fn` counts in the batch.
        carried: hidden states that `loss_fn` takes and keeps.
        noise_every: measure the noise between samples in every such update, and that of T too, and where copies run in
            several passes in every fourth one; 0 measures nothing. It changes no result. Rows must be a
            mapping, and `count_fn` take rows too.

    Raises:
        ValueError: `num_copies`, `copies_per_pass` or `ranks_per_group` out of range, `max_norm` not positive, an
            accelerator that divides losses itself, or `noise_every` below 0, or above it for a model sharded by
            `fully_shard`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        count_fn: Callable[[Any], Tensor | int],
        num_copies: int = 1,
        copies_per_pass: CopiesPerPass = "auto",
        ranks_per_group: int = 1,
        reduce_every_pass: bool | None = None,
        max_norm: float | None = None,
        copy_seed: int | None = None,
        take_copies: Callable[[Any, tuple[int, ...]], Any] = take_repeated,
        carried: Sequence[CarriedState] = (),
        noise_every: int = 0,
    ) -> None:
        self.group = CopyGroup.of(accelerator, num_copies, ranks_per_group)
        is_sharded = isinstance(model, FSDPModule)
        if is_sharded and copies_per_pass == "auto":
            copies_per_pass = len(self.group.copies)  # a rank that ran out of memory would leave the others waiting
        self.plan = CopyPlan(self.group.copies, copies_per_pass)
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"max_norm must be positive, got {max_norm}; None switches clipping off")
        if accelerator.gradient_accumulation_steps != 1:
            raise ValueError(
                "the accelerator divides losses by its gradient_accumulation_steps, "
                f"{accelerator.gradient_accumulation_steps}; build it with 1 and give all batches of an update to the "
                "step, which divides once"
            )
        if noise_every < 0 or (noise_every and is_sharded):
            raise ValueError(
                f"noise_every must be at least 0, and 0 for a model sharded by fully_shard, got {noise_every}"
            )
        self.noise_every = noise_every
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.loss_fn, self.count_fn, self.take_copies = loss_fn, count_fn, take_copies
        self.max_norm, self.copy_seed = max_norm, copy_seed
        for state in carried:
            state.copies = self.group.copies
        self._loop = PassLoop(
            accelerator,
            self.plan,
            self.group,
            copy_seed=copy_seed,
            rank_seed=_seed_of_first_rank(accelerator) if ranks_per_group > 1 else None,
            carried=[state.snapshot for state in carried],
            reduce_every_pass=is_sharded if reduce_every_pass is None else reduce_every_pass,
        )
        if noise_every and not (self._loop.reduce_every_pass and accelerator.num_processes > 1):
            self._loop.norms = PassNorms(model)  # of gradients of this rank alone

    def __call__(self, batches: Sequence[Any], *, update: int) -> UpdateResult:
        """Do update number `update` on this rank's batches of B samples each (several: accumulation).

        Batches are unrepeated and on the device. Every rank must give the same number of them.

        Raises:
            TypeError: `batches` is no list or tuple, or `count_fn` returned no whole number.
            ValueError: it is empty.
        """
        if not isinstance(batches, (list, tuple)):
            raise TypeError(
                f"batches must be a list of the update's batches, got a {type(batches).__name__}; one batch is [batch]"
            )
        if not batches:
            raise ValueError("batches must hold at least one batch, got none")
        denominator, num_targets, num_samples, try_first = self._count(batches)

        def loss_of(model: nn.Module, one: Pass, batch: Any) -> Tensor:
            return self.loss_fn(model, self.take_copies(batch, one.copies)) / denominator

        def run_pass(one: Pass, batch: Any) -> Tensor:
            nll = loss_of(self.model, one, batch)
            # ranks average their gradients; the sum over them is wanted
            self.accelerator.backward(nll * self.accelerator.num_processes)
            return nll.detach()

        scale = 1.0
        if self.noise_every and self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.get_scale()
        noise = self._halves(batches[0], update, scale) if self.noise_every and update % self.noise_every == 0 else None
        if self._loop.norms is not None:
            self._loop.norms.begin(update)
        loss = self._loop.run(self.model, batches, run_pass, loss_of, update=update, try_first=try_first)
        grad_norm = self._clip()
        self.optimizer.step()
        self.optimizer.zero_grad()
        within, between = noise or (None, None)
        if self._loop.norms is not None:
            factor = self.count_fn(batches[0]) * self.accelerator.num_processes / denominator
            by_pass = self._loop.norms.within(count_samples(batches[0]) or 0, factor * scale)
            within = within if by_pass is None else by_pass
        measured = [x for x in (within, between) if x is not None]
        loss, *means = self.accelerator.reduce(torch.stack([loss, *(x.to(loss) for x in measured)]), "sum").unbind()
        within, between = (
            None if x is None else means.pop(0) / self.accelerator.num_processes for x in (within, between)
        )
        return UpdateResult(loss, grad_norm, num_targets, num_samples, self.plan.copies_per_pass, within, between)

    def state_dict(self) -> dict[str, Any]:
        """The copies in a pass that "auto" has come to, so that a resumed run goes on with them."""
        return self.plan.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the plan of `state`, where this one may change by itself."""
        self.plan.load_state_dict(state)

    def _count(self, batches: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The denominator, targets and samples of all ranks, and whether some rank must try its batches first."""
        device = self.accelerator.device
        counts = [torch.as_tensor(self.count_fn(batch)) for batch in batches]
        for count in counts:
            if count.is_floating_point() or count.ndim:  # a fraction would be cut off the denominator
                raise TypeError(
                    "count_fn must return a whole number, as int or 0-dim integer tensor, got shape "
                    f"{tuple(count.shape)} of {count.dtype}; count the targets of the batch, without weights"
                )
        targets = sum(count.to(device) for count in counts)
        samples = sum(count_samples(batch) or 0 for batch in batches) if self.group.counts_samples else 0
        local = torch.tensor([0, samples, int(self._loop.must_try(batches))], device=device)
        local[0] = targets * len(self.group.copies)
        num_targets, num_samples, ranks_to_try = self.accelerator.reduce(local, "sum").unbind()
        may_try = self.plan.may_shrink and self.accelerator.num_processes > 1  # else nothing waits for the device
        return num_targets.clamp(min=1), num_targets, num_samples, may_try and bool(ranks_to_try)

    def _halves(self, batch: Any, update: int, scale: float) -> tuple[Tensor, Tensor]:
        """s_w^2 and s_b^2 of a batch."""
        copies, pair, model = self.group.copies, self.group.pair, self.accelerator.unwrap_model(self.model)

        def loss_of(copy: int, rows: Tensor) -> Tensor:
            half = pick_rows(self.take_copies(batch, (copy,)), rows)
            count = torch.as_tensor(self.count_fn(half)).clamp(min=1)
            return self.loss_fn(model, half) * scale / count

        return noise_of_halves(
            model,
            loss_of,
            count_samples(batch) or 0,
            copies=pair,
            states_of=[copy if copy in copies else copies[0] for copy in pair],
            seed=(self.copy_seed or 0, update, self.accelerator.process_index),
            scale=scale,
        )

    def _clip(self) -> Tensor:
        """The gradient's L2 norm before clipping, unscaled once and for all copies (fp16)."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.max_norm is not None:
            norm = self.accelerator.clip_grad_norm_(parameters, self.max_norm)
        else:
            self.accelerator.unscale_gradients()
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
