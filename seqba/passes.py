"""The passes of an update: which copies stand in each, what surrounds one, and doing them again where memory ran out.

M copies go through the network K at a time (`copies_per_pass`): M is fused, 1 accumulates one copy after the other, K
in between need not divide M. "auto" starts at M and halves on out-of-memory. `TrainStep` and the Trainer both run
their passes here.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from seqba.analysis.live import PassNorms
from seqba.context import copies_of_pass
from seqba.draws.generators import seeded_generators
from seqba.draws.measure import Snapshot, measure_draws
from seqba.draws.measured import HALF, DrawAxes, UnmeasuredError
from seqba.draws.streams import copy_streams
from seqba.groups import CopyGroup
from seqba.repeat import largest_tensor
from seqba.snapshot import model_snapshot

logger = logging.getLogger(__name__)

CopiesPerPass = int | Literal["auto"]


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
    """How many of a rank's copies stand in a pass.

    Args:
        copies: of the rank (`CopyGroup.copies`); all M where it is alone in its group.
        copies_per_pass: K from 1 to their number, or "auto": all of them, until memory runs out and K is halved.

    Raises:
        ValueError: no copies, or `copies_per_pass` out of range.
    """

    def __init__(self, copies: Sequence[int], copies_per_pass: CopiesPerPass) -> None:
        if not copies:
            raise ValueError("num_copies must be at least 1, got no copies")
        self.copies = tuple(copies)
        self.is_auto = copies_per_pass == "auto"
        self.copies_per_pass = len(self.copies) if copies_per_pass == "auto" else copies_per_pass
        plan_passes(self.copies, self.copies_per_pass)

    @property
    def passes(self) -> list[tuple[int, ...]]:
        """The copies of each pass, in order."""
        return plan_passes(self.copies, self.copies_per_pass)

    @property
    def may_shrink(self) -> bool:
        """Whether out-of-memory would halve K."""
        return self.is_auto and self.copies_per_pass > 1

    def state_dict(self) -> dict[str, Any]:
        """The copies in a pass that "auto" has come to, so that a resumed run goes on with them."""
        return {"copies_per_pass": self.copies_per_pass}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the plan of `state`, where this one may change by itself."""
        if self.is_auto:
            self.copies_per_pass = min(int(state["copies_per_pass"]), len(self.copies))


@dataclass(frozen=True)
class Pass:
    """One forward and backward: its copies, its batch among this rank's of the update, and its batch's shard."""

    copies: tuple[int, ...]
    batch: int
    shard: int
    is_last: bool


LossOfPass = Callable[[nn.Module, Pass, Any], Tensor]  # (model, pass, batch) -> the pass's part of the loss


class PassLoop:
    """The one loop over batches and passes.

    Where K may shrink and memory runs out, the passes are undone and done again with half the copies, from the state
    that they began with: gradients, buffers, generators, and what `carried` remembers. So the result is bitwise that
    of having started with the smaller K, which is kept, and said once through `logging`. Several ranks agree on K
    before any of them reduces a gradient: batches larger than any before them are tried without reduction first.

    Args:
        accelerator: names the device, and defers the reduction of gradients.
        plan: K.
        group: this rank's shards.
        copy_seed: where given, every copy draws from its own stream of (seed, update, shard, copy).
        rank_seed: where given, and `copy_seed` is not, torch's generators are seeded for each pass by (seed, update,
            shard, first copy): ranks of a group, which have the same batch, must not draw the same masks.
        carried: snapshots of what else a pass changes.
        reduce_every_pass: reduce the gradients in each pass, and not in the last alone. The sum is the same. It keeps
            gradients sharded under FSDP2, where they would wait whole for the last pass; under DDP it costs bandwidth.

    Attributes:
        measures: whether the model's draws are looked at before its copies get streams (`measure_draws`): not where a
            batch cannot be repeated, so that one copy a pass is the only plan.
        norms: where given, what looks at the gradients of the first batch of each update.
        compares: whether a fused pass is set against its copies then: not where all must stand in one pass.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        plan: CopyPlan,
        group: CopyGroup,
        *,
        copy_seed: int | None = None,
        rank_seed: int | None = None,
        carried: Sequence[Snapshot] = (),
        reduce_every_pass: bool = False,
    ) -> None:
        self.reduce_every_pass = reduce_every_pass
        self.accelerator, self.plan, self.group = accelerator, plan, group
        self.copy_seed, self.rank_seed, self.carried = copy_seed, rank_seed, carried
        self.measures, self.compares = copy_seed is not None and group.num_copies > 1, True
        self.norms: PassNorms | None = None
        self._axes: DrawAxes | None = None
        self._tried: list[tuple[int, int]] = []  # sizes of batches that fitted on all ranks, where there are several
        self._beside: list[tuple[int, int]] = []  # and that fitted beside the gradients of earlier batches

    def must_try(self, batches: Sequence[Any]) -> bool:
        """Whether one of these batches is larger than all that have fitted, and so might not fit with K copies."""
        return self.plan.may_shrink and any(_is_larger(batch, self._tried) for batch in batches)

    def passes(self, num_batches: int, *, first: int = 0, of: int | None = None) -> Iterator[Pass]:
        """The passes over `num_batches` of this rank's batches, in order.

        Args:
            num_batches: how many.
            first: the index of the first of them in the update.
            of: all batches of this rank in the update, where there are more.
        """
        plan = self.plan.passes
        for batch in range(first, first + num_batches):
            shard = self.group.shard(batch, of or num_batches)
            for i, copies in enumerate(plan):
                yield Pass(copies, batch, shard, is_last=batch == first + num_batches - 1 and i == len(plan) - 1)

    @contextmanager
    def surrounding(
        self, one: Pass, batch: Any, model: nn.Module, update: int, *, reduce: bool = True
    ) -> Iterator[None]:
        """The context of a pass: its copies, their streams, and no gradient reduction except in the last pass."""
        with ExitStack() as stack:
            if self.norms is not None and self.norms.is_on and one.batch == 0:
                ends = {"is_first": one.copies[0] == self.plan.copies[0], "is_last": one.copies == self.plan.passes[-1]}
                stack.enter_context(self.norms.of_pass(len(one.copies), **ends))
            if not reduce or not (one.is_last or self.reduce_every_pass):
                stack.enter_context(_not_reducing(self.accelerator, model))
            if self.copy_seed is None:
                if self.rank_seed is not None:
                    stack.enter_context(seeded_generators(self.rank_seed, update, one.shard, one.copies[0]))
                stack.enter_context(copies_of_pass(one.copies, batch=one.batch))
            else:
                streams = {"seed": self.copy_seed, "update": update, "shard": one.shard, "batch": one.batch}
                stack.enter_context(copy_streams(one.copies, axes=self._axes, **streams))
            yield

    def _run_pass(
        self,
        one: Pass,
        batch: Any,
        model: nn.Module,
        run_pass: Callable[[Pass, Any], Tensor],
        loss_of: LossOfPass,
        update: int,
        reduce: bool,
    ) -> Tensor:
        """One pass; where it draws what nobody has looked at, its batch is looked at, and it is done again."""
        if self.measures and self._axes is None:
            self._measure(one, batch, model, loss_of, update)
        if not self.measures:
            with self.surrounding(one, batch, model, update, reduce=reduce):
                return run_pass(one, batch)
        restores = [model_snapshot(model), *(snapshot() for snapshot in self.carried)]
        try:
            with self.surrounding(one, batch, model, update, reduce=reduce):
                return run_pass(one, batch)
        except UnmeasuredError:
            pass  # the exception is gone below, and what it kept alive
        for restore in restores:
            restore()
        self._measure(one, batch, model, loss_of, update)
        with self.surrounding(one, batch, model, update, reduce=reduce):
            return run_pass(one, batch)

    def _measure(self, one: Pass, batch: Any, model: nn.Module, loss_of: LossOfPass, update: int) -> None:
        copies, bare = self.plan.copies, self.accelerator.unwrap_model(model)
        assert self.copy_seed is not None
        try:
            self._axes = measure_draws(
                bare,
                lambda rows: loss_of(bare, Pass(rows, one.batch, one.shard, is_last=False), batch),
                self.group.pair,
                seed=self.copy_seed,
                update=update,
                shard=one.shard,
                batch=one.batch,
                known=self._axes,
                compare=self.compares and len(copies) > 1,
                rounding=None if self.accelerator.mixed_precision == "no" else HALF,
                carried=self.carried,
            )
        except RuntimeError as error:
            if self.plan.copies_per_pass > 1 or not is_out_of_memory(error):
                raise
            self.measures = False
            logger.warning(
                "two copies do not fit into memory even without gradients, so its draws could not be looked at: "
                "all of them are taken to be per copy, also those that other plans would share between copies"
            )

    def run(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        run_pass: Callable[[Pass, Any], Tensor],
        loss_of: LossOfPass,
        *,
        update: int,
        first: int = 0,
        of: int | None = None,
        try_first: bool = False,
    ) -> Tensor:
        """Do all passes over `batches`, with as many copies in each as memory holds.

        Args:
            model: whose gradients and buffers the passes change.
            batches: unrepeated.
            run_pass: forward and backward of one pass over one batch; returns its detached part of the loss.
            loss_of: that part alone, of the model without its wrappers: asked without gradients, to look at its draws.
            update: its number.
            first, of: as of `passes`.
            try_first: with several ranks, find a K that fits all of them before any of them reduces. Must be the
                same on every rank: whether `must_try` holds on any of them.

        Returns:
            The sum of what `run_pass` returned.
        """

        def attempt(reduce: bool) -> Tensor:
            parts = []
            for one in self.passes(len(batches), first=first, of=of):
                batch = batches[one.batch - first]
                parts.append(self._run_pass(one, batch, model, run_pass, loss_of, update, reduce))
            return sum(parts[1:], start=parts[0])

        if not self.plan.may_shrink:
            return attempt(True)
        if self.accelerator.num_processes > 1:
            if try_first:
                self._try_on_all_ranks(model, attempt)
                self._tried += [largest_tensor(batch) for batch in batches if _is_larger(batch, self._tried)]
            return attempt(True)
        beside = any(parameter.grad is not None for parameter in model.parameters())
        larger = [batch for batch in batches if _is_larger(batch, self._beside)]
        if beside and not larger:
            return attempt(True)  # it fits, and keeping a copy of the gradients would cost as much memory again
        undo = self._snapshot(model)
        while (fitted := self._attempt(attempt, reduce=True, must_fit=self.plan.copies_per_pass == 1)) is None:
            self._halve(undo)
        if beside:
            self._beside += [largest_tensor(batch) for batch in larger]
        return fitted

    def _snapshot(self, model: nn.Module) -> Callable[[], None]:
        gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        restores = [model_snapshot(model), *(snapshot() for snapshot in self.carried)]

        def undo() -> None:
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = None if gradient is None else gradient.clone()
            for restore in restores:
                restore()

        return undo

    def _try_on_all_ranks(self, model: nn.Module, attempt: Callable[[bool], Tensor]) -> None:
        """Find a K that fits everywhere, by doing the passes without reducing gradients; then undo them."""
        undo = self._snapshot(model)
        while True:
            failed = self._attempt(attempt, reduce=False, must_fit=False) is None
            anywhere: Tensor = self.accelerator.reduce(torch.tensor(int(failed), device=self.accelerator.device), "sum")
            if not bool(anywhere):
                undo()
                return
            self._halve(undo)

    def _attempt(self, attempt: Callable[[bool], Tensor], *, reduce: bool, must_fit: bool) -> Tensor | None:
        """The result, or None where memory ran out. The exception is gone on return, and what it kept alive."""
        try:
            return attempt(reduce)
        except RuntimeError as error:
            if must_fit or not is_out_of_memory(error):
                raise
        return None

    def _halve(self, undo: Callable[[], None]) -> None:
        before = self.plan.copies_per_pass
        if before == 1:
            raise torch.OutOfMemoryError(
                "one copy a pass, the smallest plan, is out of memory. Some rank could not hold it; give each batch "
                "fewer samples"
            )
        undo()
        clear_device_cache(garbage_collection=True)
        self.plan.copies_per_pass = before // 2
        logger.warning(
            "out of memory with %d copies in a pass; this update is done again, and the run goes on, with %d",
            before,
            self.plan.copies_per_pass,
        )


@contextmanager
def _not_reducing(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Inside, a backward pass adds to this rank's own gradients."""
    if not isinstance(model, FSDPModule):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def _is_larger(batch: Any, sizes: Sequence[tuple[int, int]]) -> bool:
    size = largest_tensor(batch)
    return not any(size[0] <= numbers and size[1] <= side for numbers, side in sizes)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
        return True
    return should_reduce_batch_size(error)
