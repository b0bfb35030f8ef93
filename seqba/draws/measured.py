"""Which axis of each draw is the copies', found by looking: passes with one copy and with two, and what they draw.

Sizes alone do not tell: a table of positions, the time axis and heads folded in front of rows can have any size. So the
same pass is run with one copy and with two equal ones, and each draw of the second is set against its own of the first.
What does not grow is one draw for all copies. What is twice as long on one axis has a copy's rows there, copies one
after the other. All else is refused by name, and so is a model whose fused pass is not its copies alone.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seqba.draws.operations import CUDNN_RNN, FUSED_ATTENTION, PERMUTATION, UNKNOWN, RandomCall
from seqba.draws.places import Place, Places
from seqba.errors import StreamError
from seqba.modules.ghost_batch_norm import GhostBatchNorm2d
from seqba.snapshot import model_snapshot

SHARED = -1  # in place of an axis
HALF = 5e-3  # what rounding to 8 or 11 bits moves in a loss, relatively
_OUTSIDE = "train without reproducible copies"


class UnmeasuredError(StreamError):
    """A draw that the passes which were looked at did not have."""


class DrawAxes:
    """The measured draws of a model: for each place, the axis of the copies' rows, or that copies share it.

    Made by `measure_draws`, and added to where a later pass has draws that the first did not have.
    """

    def __init__(self, model: nn.Module) -> None:
        self.places = Places(model)
        self._axes: dict[Place, int] = {}
        self._counts: defaultdict[int, list[Counter[str]]] = defaultdict(list)

    def axis(self, call: RandomCall) -> int:
        """The axis of a draw that is about to be made in the forward pass, or SHARED; see `axis_at`."""
        return self.axis_at(self.places.next(call.name))

    def axis_at(self, place: Place) -> int:
        """The axis of a draw at a place of the forward pass, or SHARED; `UnmeasuredError` where it was not met."""
        if place not in self._axes:
            raise UnmeasuredError(
                f"{self.places.module(place.call)} draws by {place.operation} more often than in the passes that were "
                "looked at: how often it draws depends on what it computes, which moves every number behind it; "
                f"{_OUTSIDE}"
            )
        return self._axes[place]

    def check_call(self, call: int, draws: Counter[str], output: Any) -> None:
        """Look whether a call of a module drew as often as it was seen to.

        Raises:
            UnmeasuredError: it did not. Every number drawn behind it would be another one. Outside of modules, where
                this shows when gradients have been added, it is a plain StreamError.
        """
        known = self._counts[call]
        if +draws not in known and (known or draws):
            raise (UnmeasuredError if call else StreamError)(
                f"{self.places.module(call)} drew {_times(draws)}, but {_times(known[0] if known else Counter())} in "
                "the passes that were looked at: how often it draws depends on what it computes, which moves every "
                f"number behind it; {_OUTSIDE}"
            )

    def add(self, look: Look) -> None:
        """Know what a pass of two equal copies has shown."""
        self._axes.update(look.axes)
        for call, draws in look.counts.items():
            if +draws not in self._counts[call]:
                self._counts[call].append(+draws)


class Look:
    """One pass that is looked at: every draw's shape, and how often each call of a module drew.

    Args:
        places: of the model.
        alone: the same pass with one copy, where this one has two equal ones: the draws are set against each other.
        known: the axes, where they are known already.
    """

    def __init__(self, places: Places, alone: Look | None = None, known: DrawAxes | None = None) -> None:
        self.places, self.alone, self.known = places, alone, known
        self.shapes: dict[Place, tuple[int, ...]] = {}
        self.axes: dict[Place, int] = {}
        self.counts: dict[int, Counter[str]] = {}

    def axis(self, call: RandomCall) -> int:
        """The axis of the copies' rows in a draw that is about to be made, or SHARED.

        Raises:
            StreamError: a draw of two equal copies is not twice as long on one axis as that of one, or cannot be cut.
        """
        place = self.places.next(call.name)
        self.shapes[place] = call.shape
        if self.known is not None:
            return self.known.axis_at(place)
        if self.alone is None or place not in self.alone.shapes:  # what the latter is shows in the counts
            return SHARED
        self.axes[place] = self._grown(self.alone.shapes[place], call, self.places.module(place.call))
        return self.axes[place]

    def _grown(self, one: tuple[int, ...], call: RandomCall, module: str) -> int:
        two = call.shape
        grown = [axis for axis, (x, y) in enumerate(zip(one, two, strict=False)) if x != y]
        if one == two:
            return SHARED
        if len(one) == len(two) and len(grown) == 1 and 2 * one[grown[0]] == two[grown[0]] and can_be_cut(call):
            return grown[0]
        what = "over a PackedSequence, whose rows are interleaved in time, " if call.packed else ""
        raise StreamError(
            f"{call.name} in {module} draws {what}{one} numbers for one copy and {two} for two, which cannot be told "
            "apart by copy. If one draw is meant for all copies, wrap it in `with seqba.shared_draws():`; else keep "
            f"the rows of a copy together on one axis, or {_OUTSIDE}"
        )

    def note_call(self, call: int, draws: Counter[str], output: Any) -> None:
        """Keep how often a call of a module drew."""
        self.counts[call] = +draws


def can_be_cut(call: RandomCall) -> bool:
    """Whether the numbers of a draw are made row by row, so that each copy's can be made alone."""
    return call.kind not in (PERMUTATION, UNKNOWN, FUSED_ATTENTION, CUDNN_RNN) and call.has_rows and not call.packed


def compare_counts(a: Look, b: Look) -> None:
    """Refuse a module that draws more often in a pass of two copies than in one of one.

    Raises:
        StreamError: its name, and how often.
    """
    for call in a.counts.keys() | b.counts.keys():
        here, there = a.counts.get(call, Counter()), b.counts.get(call, Counter())
        if here != there:
            raise StreamError(
                f"{a.places.module(call)} draws {_times(here)} in a pass of one copy and {_times(there)} in one of "
                "two: how often it draws depends on the rows, which moves every number behind it (a draw a row, "
                f"rejection, routing); {_OUTSIDE}"
            )


def _times(draws: Counter[str]) -> str:
    return ", ".join(f"{count} times by {name}" for name, count in sorted(draws.items())) or "nothing"


# ---- what a pass gives, in numbers that can be set against each other


def add_up(one: Any, other: Any, both: Any, rounding: float | None) -> bool:
    """Whether what a pass over two copies gives is what the copies alone give, but for rounding."""
    (a, tolerance), (b, _), (c, _) = (_size_of(x, rounding) for x in (one, other, both))
    return abs(c - a - b) <= 4 * tolerance


def _size_of(output: Any, rounding: float | None) -> tuple[float, float]:
    """A number that adds up over the rows of an output, and what rounding may move in it."""
    total, tolerance = 0.0, 0.0
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            numbers = leaf.detach().double().nan_to_num(0.0, 0.0, 0.0)
            own = numbers if leaf.ndim == 0 else numbers.square().sum() + numbers.abs().sum()
            total += float(own)
            tolerance += abs(float(own)) * (rounding or _rounding(leaf.dtype))
    return total, tolerance


Buffers = dict[str, Tensor]


def buffers_of(model: nn.Module) -> Buffers:
    """The floating-point buffers of a model as they are, but for the running statistics of ghost batch norm."""
    ghosts = {path for path, module in model.named_modules() if isinstance(module, GhostBatchNorm2d)}
    return {
        name: x.clone()
        for name, x in model.named_buffers()
        if x.is_floating_point() and name.rpartition(".")[0] not in ghosts
    }


def refuse_state(
    model: nn.Module, first: tuple[Any, Buffers], second: tuple[Any, Buffers], rounding: float | None
) -> None:
    """Refuse a model in which a pass differs from the pass before it, under the same draws; of each output and buffers.

    Raises:
        StreamError: the model, or the module whose buffer each pass moves.
    """
    (output, buffers), (again, later) = first, second
    moved = [name for name, x in buffers.items() if not torch.equal(x, later.get(name, x.new_empty(0)))]
    if moved:
        raise StreamError(
            f"{moved[0]} is moved by every pass, so that it depends on how many passes an update has (spectral norm, "
            f"averages of its own); switch it off, or {_OUTSIDE}"
        )
    (size, tolerance), (repeated, _) = _size_of(output, rounding), _size_of(again, rounding)
    if abs(size - repeated) > tolerance:
        raise StreamError(
            f"two passes of {type(model).__name__} from the same seed differ: it seeds torch itself (torch.seed()), "
            "has a generator of its own, or keeps state from one pass to the next; make what it draws depend on "
            f"torch's generator alone, or {_OUTSIDE}"
        )


def _rounding(dtype: torch.dtype) -> float:
    """Of what a network computes by matrix products in a type, relatively; autocast and TF32 compute in fewer bits."""
    if dtype in (torch.bfloat16, torch.float16) or any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        return HALF
    if dtype == torch.float32 and torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32:
        return 2e-3
    return 2e-5 if dtype == torch.float32 else 1e-9


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """No gradients, no compiled code, and batch norm in evaluation mode; modes and buffers as before afterwards."""
    restore = model_snapshot(model)
    for module in batch_norms(model):
        module.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")  # of checkpointing
            yield
    finally:
        restore()


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Those that normalise all rows of a pass together while they train."""
    kinds = nn.modules.batchnorm._BatchNorm
    return [m for m in model.modules() if isinstance(m, kinds) and not isinstance(m, GhostBatchNorm2d) and m.training]


class Outputs:
    """The first floating-point tensor of each module call of a pass, in the order in which the calls returned."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}

    def note_call(self, call: int, draws: Counter[str], output: Any) -> None:
        """Keep a call's tensor."""
        found = [x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]
        if found:
            self.tensors[call] = found[0].detach().float()


def where_they_part(one: Outputs, other: Outputs, both: Outputs, places: Places) -> str:
    """The first module whose output for two copies in one pass is not that of the copies alone."""
    for call, fused in both.tensors.items():
        a, b = one.tensors.get(call), other.tensors.get(call)
        if a is None or b is None or a.ndim != fused.ndim or a.shape != b.shape:
            continue
        grown = [i for i in range(a.ndim) if a.shape[i] != fused.shape[i]]
        if len(grown) == 1 and fused.shape[grown[0]] == 2 * a.shape[grown[0]]:
            want = torch.cat([a, b], grown[0])
            scale = want.abs().max().clamp(min=1e-12)
            if bool((fused - want).abs().max() > 1e-3 * scale):
                return places.module(call)
    return "what is computed behind the modules"
