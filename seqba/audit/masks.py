"""Do the copies really differ? The audit of a model's random operations."""

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seqba.audit.modules import RunningModules
from seqba.audit.report import INACTIVE, PER_COPY, SHARED, MaskAudit, Operation, folded_path, path_pattern
from seqba.audit.state import OwnGenerators, bare, undisturbed
from seqba.audit.trace import STOCHASTIC_DEPTH, Findings, Site, Trace, Tracer, growing_axis, is_floating
from seqba.audit.variance import (
    HeldDraws,
    HeldPass,
    RunHeld,
    copies_differ,
    copies_differ_unseen,
    cuttable_kernels,
    total_effects,
)
from seqba.context import copies_of_pass
from seqba.repeat import count_samples, repeat_batch, unfold

UNSEEN = "randomness outside torch"
_NOT_ASKED = "not measured, as asked"
_NO_ROWS = "not measured, since the model returned no floating-point tensor with rows of samples"
NO_EFFECT = "no effect on output or gradient"
_COINS = (0.0, 0.5)  # beside 1: what a single number that is drawn is set to, as a share of its range
_HOST_TRACES = 4  # pairs of traces where Python's or numpy's generator may skip parts of the model


def audit_masks(
    model: nn.Module,
    batch: Any,
    num_copies: int = 2,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    dim: int = 0,
    measure_variance: bool = True,
) -> MaskAudit:
    """Find each random operation that a training pass meets, and whether its draws differ between copies.

    By evidence, not by name: the pass runs with M copies and with M - 1, and draws whose numbers grow with the copies
    are `per copy`; others are `shared` by them (DropConnect, LayerDrop, stochastic depth by batch). What could draw and
    does not (p=0, eval mode) is `inactive`: calls of torch's dropout, attention and recurrent functions, modules whose
    class is named after DropPath or StochasticDepth, and transformers' `layerdrop`. A single uniform number comes out
    as almost 1 in one pass and as 0 in another, so that layers which LayerDrop skips are met too. Python's and numpy's
    generators are watched between the calls of modules. If nothing is found per copy, the copies are compared under
    equal draws: what makes them differ then is listed as `randomness outside torch`.

    Args:
        model: any module; wrappers of data parallelism and `torch.compile` are taken off. In training mode it is run
            as it is (submodules in eval mode stay so); in eval mode it is told `model.train()` first. Modes,
            buffers and generators are put back, gradients are not touched.
        batch: B samples, not repeated, on the model's device; `repeat_batch` repeats it.
        num_copies: M, at least 2. More give a sharper estimate of the variance.
        forward: runs the model on a batch and returns its output; by default `model(**batch)` for a mapping,
            `model(*batch)` for a tuple or list, `model(batch)` otherwise.
        dim: the batch's sample axis, as in `repeat_batch`.
        measure_variance: also measure each operation's total effect on the variance over copies of the first
            floating-point output with rows (`seqba.audit.variance` has the definition; the shares may add up to
            more than 100 %): five forward passes more, and four for each `per copy` row of the table.

    Returns:
        The audit; `print` shows it as a table.

    Raises:
        ValueError: `num_copies` is below 2, or the batch cannot be repeated.
        TypeError: the batch holds what cannot be repeated: a `PackedSequence`, nested or sparse tensor.

    >>> import torch
    >>> layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 5), nn.Dropout(0.0))
    >>> print(audit_masks(layers, torch.ones(4, 3)))
    Random operations of Sequential in training mode, 2 copies of 4 samples
    <BLANKLINE>
    module  kind     p    calls  draws           variance
    ------  -------  ---  -----  --------------  --------
    1       dropout  0.1      1  per copy         100.0 %
    3       dropout  0        1  inactive (p=0)
    <BLANKLINE>
    Shares of the variance: total effects, each with its interactions, so that they may add up to more than 100 %.
    <BLANKLINE>
    The copies differ.
    """
    if isinstance(num_copies, bool) or not isinstance(num_copies, int) or num_copies < 2:
        raise ValueError(f"num_copies must be an integer of at least 2, since copies are compared, got {num_copies!r}")
    model = bare(model)
    with undisturbed(model) as own:
        return _Auditor(model, batch, num_copies, forward or call_model, dim, own).audit(measure_variance)


def call_model(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch: a mapping by keyword, a tuple or list by position, anything else as the one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


_Row = tuple[Operation, frozenset[Site]]


class _Auditor:
    """One audit: its passes, and what they say."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        num_copies: int,
        forward: Callable[[nn.Module, Any], Any],
        dim: int,
        own: OwnGenerators,
    ) -> None:
        self.model, self.forward, self.own = model, forward, own
        self.num_copies = num_copies
        num_samples = count_samples(batch, dim)
        if num_samples is None:
            raise ValueError("the batch holds no tensor with rows, so there is nothing to repeat")
        self.num_samples = num_samples
        self.copies = (num_copies - 1, num_copies)
        self.batches = {number: repeat_batch(batch, number, dim=dim) for number in self.copies}
        self.findings = Findings()

    def audit(self, measure_variance: bool) -> MaskAudit:
        few, many = self.trace_pair(coin=1.0, host_seed=0)
        for coin in _COINS if many.one_number else ():
            self.trace_pair(coin=coin, host_seed=0)
        for host_seed in range(1, _HOST_TRACES if many.words else 0):
            self.trace_pair(coin=1.0, host_seed=host_seed)
        if not self.findings.per_copy:
            self.trace_pair(coin=1.0, host_seed=0, backward=True)
        rows = self.rows()
        run = self.held_runner(few, many)
        if run is not None and self.findings.per_copy and not self.findings.per_copy_hosts:
            everything = set(self.findings.per_copy)
            if not (copies_differ(run, everything) or self.gradients_differ(few, many, everything)):
                rows = [(_without_effect(one), sites) for one, sites in rows]
        operations = [operation for operation, _ in rows]
        if run is None:
            return self.report(operations, _NO_ROWS if measure_variance else _NOT_ASKED)
        if not any(one.scope == PER_COPY for one in operations):
            if copies_differ_unseen(run):
                operations.insert(0, Operation("", ("",), UNSEEN, None, PER_COPY, 1))
            return self.report(operations)
        if not measure_variance:
            return self.report(operations, _NOT_ASKED)
        return self.report(*self.with_shares(rows, run))

    def report(self, operations: list[Operation], variance_note: str = "") -> MaskAudit:
        return MaskAudit(type(self.model).__name__, self.num_copies, self.num_samples, operations, variance_note)

    # ---- passes

    def trace_pair(self, *, coin: float, host_seed: int, backward: bool = False) -> tuple[Trace, Trace]:
        """Trace a pass with fewer and one with more copies, alike in all else, and note what they say."""
        few, many = (self.trace(number, coin, host_seed, backward) for number in self.copies)
        self.findings.add(few, many, self.copies)
        return few, many

    def trace(self, num_copies: int, coin: float, host_seed: int, backward: bool) -> Trace:
        _seed_hosts(host_seed)
        modules = RunningModules(self.model)
        tracer = Tracer(modules, self.own, coin=coin)
        with modules.followed(), tracer, copies_of_pass(range(num_copies)), torch.set_grad_enabled(backward):
            output = self.forward(self.model, self.batches[num_copies])
            if backward:
                self.gradient(output)
        return tracer.finish(output)

    def gradient(self, output: Any) -> list[Tensor | None]:
        """Of the squares of all that a pass returns, to the weights."""
        found = [x.float().square().sum() for x in tree_leaves(output) if is_floating(x) and x.requires_grad]
        weights = [p for p in self.model.parameters() if p.requires_grad]
        if not found or not weights:
            return []
        return list(torch.autograd.grad(torch.stack(found).sum(), weights, allow_unused=True))

    def gradients_differ(self, few: Trace, many: Trace, sites: Collection[Site]) -> bool:
        """Whether draws that the output does not show (the factor B of a fresh LoRA is 0) show in the gradient."""
        run = self.held_runner(few, many, with_gradient=True)
        assert run is not None
        one, other = (run(seed, sites).gradient for seed in (0, 1))
        return any(
            a is not None and b is not None and bool((a - b).abs().max() > 1e-5 * a.abs().max())
            for a, b in zip(one, other, strict=True)
        )

    def held_runner(self, few: Trace, many: Trace, *, with_gradient: bool = False) -> RunHeld | None:
        """How to run a pass under held draws, or None where no output has rows."""
        leaves = zip(few.outputs, many.outputs, strict=False)
        axes = [None if a is None or b is None else growing_axis(a, b, self.copies) for a, b in leaves]
        place = next((i for i, axis in enumerate(axes) if axis is not None), None)
        if place is None:
            return None

        def run(seed: int, free: Collection[Site]) -> HeldPass:
            _seed_hosts(seed)
            modules = RunningModules(self.model, watch_hosts=False)
            draws = HeldDraws(self.findings, modules, self.own, num_copies=self.num_copies, seed=seed, free=free)
            kernels, copies = cuttable_kernels(many.recurrent_kernel), copies_of_pass(range(self.num_copies))
            with modules.followed(), kernels, draws, copies, torch.set_grad_enabled(with_gradient):
                returned = self.forward(self.model, self.batches[self.num_copies])
                gradient = self.gradient(returned) if with_gradient else []
            output = tree_leaves(returned)[place].detach().float()
            return HeldPass(unfold(output, self.num_copies, dim=axes[place] or 0), draws.uncut, gradient, draws.met)

        return run

    # ---- what they said

    def rows(self) -> list[_Row]:
        """Sites that differ in the layer's number only count as one; in the model's order, inactive ones last."""
        order = {path: number for number, (path, _) in enumerate(self.model.named_modules())}
        found = [(site, PER_COPY, "", calls) for site, calls in self.findings.per_copy.items()]
        found += [(site, SHARED, "", calls) for site, calls in self.findings.shared.items()]
        found += [(site, INACTIVE, reason, calls) for site, (reason, calls) in self.findings.inactive.items()]
        found.sort(key=lambda one: (one[1] == INACTIVE, order[one[0].path]))
        groups: dict[tuple, list[tuple[Site, int]]] = {}
        for site, scope, reason, calls in found:
            # each block of a network has its own probability of being dropped: one row for all of them
            probability = None if site.kind == STOCHASTIC_DEPTH else site.probability
            key = (path_pattern(site.path), site.kind, probability, scope, reason)
            groups.setdefault(key, []).append((site, calls))
        return [_row(group, scope, reason) for (*_, scope, reason), group in groups.items()]

    def with_shares(self, rows: list[_Row], run: RunHeld) -> tuple[list[Operation], str]:
        """The rows' operations with their shares of the variance, or the reason why there are none."""
        if self.findings.per_copy_hosts:
            generators = ", ".join(sorted({site.kind for site in self.findings.per_copy_hosts}))
            return [one for one, _ in rows], f"not measured, since draws of {generators} cannot be told apart by copy"
        shares, note = total_effects(run, [sites for operation, sites in rows if operation.scope == PER_COPY])
        left = iter(shares)
        return [
            replace(one, variance_share=next(left, None)) if one.scope == PER_COPY else one for one, _ in rows
        ], note


def _row(group: list[tuple[Site, int]], scope: str, reason: str) -> _Row:
    sites = [site for site, _ in group]
    probabilities = [site.probability for site in sites if site.probability is not None]
    paths = tuple(dict.fromkeys(site.path for site in sites))
    operation = Operation(
        path=folded_path(paths),
        paths=paths,
        kind=sites[0].kind,
        probability=(min(probabilities), max(probabilities)) if probabilities else None,
        scope=scope,
        calls=sum(calls for _, calls in group),
        variance_share=None if scope == PER_COPY else 0.0,
        reason=reason,
    )
    return operation, frozenset(sites)


def _seed_hosts(seed: int) -> None:
    """Python's and numpy's generators, so that passes that are compared take the same branches."""
    random.seed(seed)
    np.random.seed(seed)


def _without_effect(operation: Operation) -> Operation:
    return replace(operation, scope=INACTIVE, reason=NO_EFFECT) if operation.scope == PER_COPY else operation
