"""The share of the output's variance over copies that each operation causes: its total effect.

With the draws U_1 .. U_k of the operations, f the output and U_~i all draws but those of operation i,
    S_Ti = E[Var(f | U_~i)] / Var(f)
(Homma and Saltelli 1996, "Importance measures in global sensitivity analysis of nonlinear models"; after Sobol 1993).
Both variances are over copies, within a pass: the numerator's copies differ in the draws of operation i alone and share
all others, the denominator's differ in all draws that are per copy. Each is the mean, over the output's
numbers and a few passes, of the unbiased sample variance over the M copies. Interactions count in the share of
each operation that takes part, so the shares add up to 1 for additive effects and to more otherwise.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqba.audit.modules import RunningModules
from seqba.audit.state import OwnGenerators
from seqba.audit.trace import Findings, Site, draws_nothing, site_of
from seqba.draws.callers import RECURRENT_DROPOUT
from seqba.draws.generators import mix
from seqba.draws.operations import CUDNN_RNN, FUSED_ATTENTION, PERMUTATION, UNKNOWN, RandomCall
from seqba.draws.streams import CopyStreams

_PASSES = 4  # passes that each variance is averaged over
# Copies under equal draws still differ by rounding, since kernels add in another order in other rows.
_ROUNDING = 1e-5


class HeldDraws(CopyStreams):
    """Draws every number from a seed, with copies that differ in the draws of the `free` sites only.

    `uncut` names the draws per copy that could not be told apart by copy, and so were not held.
    """

    def __init__(
        self,
        findings: Findings,
        modules: RunningModules,
        own: OwnGenerators,
        *,
        num_copies: int,
        seed: int,
        free: Collection[Site],
    ) -> None:
        super().__init__(tuple(range(num_copies)), None)
        self.findings, self.modules, self.own = findings, modules, own
        self.num_copies, self.seed, self.free = num_copies, seed, set(free)
        self.uncut: list[str] = []
        self.met: set[Site] = set()
        self._order = 0
        self._places: dict[Site, int] = {}

    def on_draw(self, call: RandomCall) -> Any:
        """Draw block by block, with one seed for all copies or one for each."""
        self.own.meet(call.own_generator())
        if draws_nothing(call):
            return call.run()
        site = site_of(call, self.modules)
        self.met.add(site)
        place = self._places.get(site, 0)
        self._places[site], self._order = place + 1, self._order + 1
        key = mix(self.seed, self._order)
        if site not in self.findings.per_copy or (site, place) in self.findings.shared_places:
            return self.draw(call, key)
        axis = self.findings.axes.get((site, place))
        if axis is not None and (call.caller is None or call.caller.kind != RECURRENT_DROPOUT):
            call = replace(call, row_dim=axis)
        if not self.can_cut(call):
            self.uncut.append(str(call.name))
            return self.draw(call, key)
        self.copies = tuple(range(self.num_copies)) if site in self.free else (0,) * self.num_copies
        return self.draw_blocks(call, key)

    def can_cut(self, call: RandomCall) -> bool:
        """Whether the numbers that a call draws are blocks of rows, one for each copy."""
        if call.kind in (FUSED_ATTENTION, CUDNN_RNN, PERMUTATION, UNKNOWN) or call.is_nested:
            return False
        try:
            self.rows_of_a_copy(call)
        except RuntimeError:
            return False
        return True


@contextmanager
def cuttable_kernels(recurrent: bool) -> Iterator[None]:
    """Attention, and recurrent networks where asked, without the kernels that draw inside, where a device has those."""
    with ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


@dataclass(frozen=True)
class HeldPass:
    """The output of a pass under held draws.

    Attributes:
        output: (M, B, ...), float32.
        uncut: the draws that were not held.
        gradient: where it was asked for.
        met: the sites that drew.
    """

    output: Tensor
    uncut: list[str]
    gradient: Sequence[Tensor | None] = ()
    met: Collection[Site] = ()

    @property
    def variance(self) -> float:
        """The mean, over the output's finite numbers, of the unbiased variance over the copies."""
        variance = self.output.var(dim=0)
        return float(variance[variance.isfinite()].mean())

    @property
    def scale(self) -> float:
        """The variance of all of the output's finite numbers."""
        return float(self.output[self.output.isfinite()].var())


# (seed, the sites whose draws differ between copies) -> what the pass gave
RunHeld = Callable[[int, Collection[Site]], HeldPass]


def copies_differ_unseen(run: RunHeld) -> bool:
    """Whether copies differ although all draws that were seen are equal: something draws where nobody looks."""
    held = run(0, ())
    return not held.uncut and held.variance > _ROUNDING * held.scale


def copies_differ(run: RunHeld, sites: Collection[Site]) -> bool:
    """Whether the output differs between copies more under draws of their own than under equal ones.

    Also where that cannot be told: some draws were not held, or lie behind a coin that fell otherwise.
    """
    held, free = run(0, ()), run(0, sites)
    return bool(free.uncut) or not set(sites) <= set(free.met) or free.variance > 4 * held.variance


def total_effects(run: RunHeld, groups: Sequence[Collection[Site]]) -> tuple[list[float], str]:
    """The share of each group of sites, which together are all that is per copy; or no shares, and the reason why."""
    everything = {site for group in groups for site in group}
    held, free = run(0, ()), [run(seed, everything) for seed in range(_PASSES)]
    total = sum(one.variance for one in free)
    mean = total / _PASSES
    equal = held.variance > 0.01 * mean
    if mean == 0 or (equal and mean < _ROUNDING * held.scale):
        return [], (
            "not measured, since the output is the same for all copies under these weights (the factor B of a fresh "
            "LoRA is 0, so that its dropout shows in the gradient first)"
        )
    if held.uncut:
        return [], f"not measured, since draws of {', '.join(sorted(set(held.uncut)))} cannot be told apart by copy"
    if equal:
        return [], (
            "not measured, since copies differ even where their draws are equal: rows are not in copy-major order "
            "where they are drawn for, or a draw does not go through torch"
        )
    return [sum(run(seed, group).variance for seed in range(_PASSES)) / total for group in groups], ""
