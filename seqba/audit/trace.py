"""The random operations of a forward pass, and whether they draw more numbers for more copies."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seqba.audit.modules import RunningModules
from seqba.audit.state import OwnGenerators
from seqba.draws.callers import ATTENTION_DROPOUT, RECURRENT_DROPOUT, Caller
from seqba.draws.operations import CUDNN_RNN, FUSED_ATTENTION, RandomCall, RandomOps

LAYER_DROP = "LayerDrop"
STOCHASTIC_DEPTH = "stochastic depth"

# raw draws by the first word of their aten name: what they are called in the table
_RAW_KINDS = {
    "bernoulli": "bernoulli",
    "rand": "uniform",
    "uniform": "uniform",
    "randn": "normal",
    "normal": "normal",
    "native": "dropout",
    "randperm": "permutation",
    "randint": "random integers",
    "random": "random integers",
}
_STOCHASTIC_DEPTH_CLASSES = ("DropPath", "StochasticDepth")


@dataclass(frozen=True, order=True)
class Site:
    """Where and how numbers are drawn: calls that agree in all of this count as one operation (see `Operation`)."""

    path: str
    kind: str
    probability: float | None


@dataclass
class Trace:
    """The random operations of one forward pass."""

    draws: dict[Site, list[tuple[int, ...]]] = field(default_factory=dict)  # the shape of each draw, in order
    idle: dict[Site, tuple[str, int]] = field(default_factory=dict)  # did not draw: why not, and how often called
    words: dict[Site, tuple[int, int]] = field(default_factory=dict)  # of the host: 32-bit words, places
    outputs: list[tuple[int, ...] | None] = field(default_factory=list)  # floating-point shapes, None for all else
    one_number: bool = False  # whether some draw was a single number, on which the model may branch (LayerDrop)
    recurrent_kernel: bool = False  # whether cuDNN dropped out between the layers of a recurrent network


class Tracer(RandomOps):
    """Writes down each draw of a forward pass.

    A single uniform number is drawn as the share `coin` of its range, so that two traces (almost 1, and 0) see both
    branches of a model that skips a layer by it.
    """

    def __init__(self, modules: RunningModules, own: OwnGenerators, *, coin: float) -> None:
        super().__init__()
        self.modules, self.own, self.coin = modules, own, coin
        self.trace = Trace()

    def on_draw(self, call: RandomCall) -> Any:
        """Run the call as it is, and note it."""
        self.own.meet(call.own_generator())
        result = call.run()
        if draws_nothing(call):
            return result
        site, shape = site_of(call, self.modules), _shape(result)
        if reason := _why_unused(site, self.modules.module):
            self._add_idle(site, reason)
        else:
            self.trace.draws.setdefault(site, []).append(shape)
        self.trace.recurrent_kernel |= call.kind == CUDNN_RNN
        if torch.Size(shape).numel() == 1:
            self.trace.one_number = True
            _set_coin(call, result, self.coin)
        return result

    def on_return(self, caller: Caller, num_draws: int) -> None:
        """Note a function that could have drawn."""
        if num_draws == 0:
            site = Site(self.modules.path, caller.kind, caller.probability)
            self._add_idle(site, _why_idle(caller, self.modules.module))

    def finish(self, output: Any) -> Trace:
        """The trace, with what the model returned and what only its modules' attributes tell."""
        self.trace.outputs = [_shape(leaf) if is_floating(leaf) else None for leaf in tree_leaves(output)]
        for (path, generator), words in self.modules.host_draws.items():
            module = self.modules.model.get_submodule(path)
            layer_drop = _attributes(module).get(LAYER_DROP)
            site = Site(path, generator, None) if layer_drop is None else Site(path, LAYER_DROP, layer_drop)
            if reason := _why_unused(site, module):
                self._add_idle(site, reason)
            else:
                self.trace.words[site] = words
        self._add_idle_modules()
        return self.trace

    def _add_idle(self, site: Site, reason: str) -> None:
        self.trace.idle[site] = (reason, self.trace.idle.get(site, ("", 0))[1] + 1)

    def _add_idle_modules(self) -> None:
        """Modules that ran and would have drawn without any torch function's name, had they not been off."""
        met = {(site.path, site.kind) for site in (*self.trace.draws, *self.trace.words, *self.trace.idle)}
        for path in self.modules.called:
            module = self.modules.model.get_submodule(path)
            for kind, probability in _attributes(module).items():
                if (path, kind) not in met:
                    reason = "eval mode" if not module.training else _why_probability(probability)
                    self._add_idle(Site(path, kind, probability), reason)


def draws_nothing(call: RandomCall) -> bool:
    """Whether a random operation only looks like one: a fused kernel without dropout, a seed for cuDNN's generator."""
    if call.kind == CUDNN_RNN and (call.argument("num_layers") == 1 or "init_dropout_state" in call.name):
        return True
    if call.kind in (FUSED_ATTENTION, CUDNN_RNN):
        return not call.drops_out
    recurrent = call.caller is not None and call.caller.kind == RECURRENT_DROPOUT
    return recurrent and call.shape == ()


def site_of(call: RandomCall, modules: RunningModules) -> Site:
    """The site of a draw: named by the torch function it is part of, else by its module, else by its operation."""
    if call.caller is not None:
        return Site(modules.path, call.caller.kind, call.caller.probability)
    if call.kind in (FUSED_ATTENTION, CUDNN_RNN):
        kind = ATTENTION_DROPOUT if call.kind == FUSED_ATTENTION else RECURRENT_DROPOUT
        return Site(modules.path, kind, call.dropout)
    attributes = _attributes(modules.module)
    layer_drop = attributes.get(LAYER_DROP, getattr(getattr(modules.module, "config", None), "layerdrop", None))
    if isinstance(layer_drop, float) and torch.Size(call.shape).numel() == 1:
        return Site(modules.path, LAYER_DROP, layer_drop)
    for named in (STOCHASTIC_DEPTH, getattr(modules.module, "mask_kind", "")):
        if named in attributes:
            return Site(modules.path, named, attributes[named])
    base = call.func._schema.name.partition("::")[2].strip("_")
    kind = _RAW_KINDS.get(base.split("_")[0], base.replace("_", " "))
    return Site(modules.path, kind, _bernoulli_probability(call) if base == "bernoulli" else None)


def is_floating(leaf: Any) -> bool:
    """Whether a leaf of an output is a floating-point tensor."""
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def growing_axis(small: tuple[int, ...], large: tuple[int, ...], copies: tuple[int, int]) -> int | None:
    """The axis that grew in the ratio of the copies (fewer, more), or None.

    >>> growing_axis((8, 3, 5), (8, 6, 5), copies=(1, 2))
    1
    """
    if len(small) != len(large):
        return None
    fewer, more = copies
    return next((axis for axis, (a, b) in enumerate(zip(small, large, strict=True)) if 0 < a * more == b * fewer), None)


@dataclass
class Findings:
    """What pairs of traces with fewer and with more copies say together. A place is a draw's number within its site."""

    per_copy: Counter[Site] = field(default_factory=Counter)  # how many draws of a site grow with the copies
    shared: Counter[Site] = field(default_factory=Counter)  # and how many do not
    idle: dict[Site, tuple[str, int]] = field(default_factory=dict)  # as in `Trace`
    axes: dict[tuple[Site, int], int] = field(default_factory=dict)  # which axis of a per-copy draw holds the rows
    shared_places: set[tuple[Site, int]] = field(default_factory=set)
    per_copy_hosts: set[Site] = field(default_factory=set)  # per-copy sites of Python's and numpy's generators

    def add(self, few: Trace, many: Trace, copies: tuple[int, int]) -> None:
        """Compare one pair of traces that differ in nothing but the number of copies (fewer, more)."""
        known = set(self.per_copy) | set(self.shared)
        for site, shapes in many.draws.items():
            if site not in known:
                self._add_site(site, few.draws.get(site, []), shapes, copies)
        for site, (words, places) in many.words.items():
            if site not in known:
                grows = words > few.words.get(site, (0, 0))[0]
                (self.per_copy if grows else self.shared)[site] = places
                if grows:
                    self.per_copy_hosts.add(site)
        self.idle.update({site: why for site, why in many.idle.items() if site not in self.idle})

    @property
    def inactive(self) -> dict[Site, tuple[str, int]]:
        """The sites that never drew in any trace."""
        drawn = {*self.per_copy, *self.shared}
        return {site: why for site, why in self.idle.items() if site not in drawn}

    def _add_site(self, site: Site, few: list[tuple], many: list[tuple], copies: tuple[int, int]) -> None:
        if len(few) == len(many):  # the same program: the draws pair in order
            for place, (small, large) in enumerate(zip(few, many, strict=True)):
                axis = growing_axis(small, large, copies)
                if axis is not None:
                    self.axes[site, place] = axis
                if small == large:
                    self.shared_places.add((site, place))
                (self.shared if small == large else self.per_copy)[site] += 1
            return
        for shape, number in Counter(many).items():  # a loop over rows draws more often, not more at once
            (self.shared if Counter(few)[shape] == number else self.per_copy)[site] += number


def _shape(result: Any) -> tuple[int, ...]:
    """The shape of the first tensor that a random operation returned."""
    first = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
    return (sum(x.numel() for x in first.unbind()),) if first.is_nested else tuple(first.shape)


def _bernoulli_probability(call: RandomCall) -> float | None:
    """The probability of a one: a number, or a tensor that holds one number only."""
    p = call.argument("p")
    p = call.argument("self") if p is None else p
    if isinstance(p, Tensor):
        low, high = (float(bound) for bound in p.aminmax()) if p.numel() else (0.0, 1.0)
        return round(low, 6) if low == high else None
    return float(p)


def _set_coin(call: RandomCall, result: Any, coin: float) -> None:
    name = call.func._schema.name
    base = name.partition("::")[2].strip("_")
    if base in ("rand", "uniform"):
        low, high = (0, 1) if base == "rand" else (call.argument("from"), call.argument("to"))
        result.fill_(low + (high - low) * min(coin, 1 - torch.finfo(result.dtype).eps))
    elif base == "bernoulli":
        result.fill_(round(coin))
    elif base in ("randn", "normal"):
        result.fill_(6 * coin - 3)  # deviations
    elif base == "randint":
        low, high = call.argument("low") or 0, call.argument("high")
        result.fill_(low + round((high - 1 - low) * coin))


def _attributes(module: nn.Module) -> dict[str, float]:
    """Random operations that only a module's attributes name.

    LayerDrop of transformers, stochastic depth by class, the masks of `seqba.modules`.
    """
    found = {LAYER_DROP: getattr(module, "layerdrop", None)}
    if isinstance(kind := getattr(module, "mask_kind", None), str):
        found[kind] = getattr(module, "p", None)
    if any(name in type(module).__name__ for name in _STOCHASTIC_DEPTH_CLASSES):
        found[STOCHASTIC_DEPTH] = getattr(module, "drop_prob", getattr(module, "p", None))
    return {kind: float(value) for kind, value in found.items() if isinstance(value, (int, float))}


def _why_idle(caller: Caller, module: nn.Module) -> str:
    return _why_probability(caller.probability) if caller.training and module.training else "eval mode"


def _why_unused(site: Site, module: nn.Module) -> str:
    """Why a draw has no effect: some LayerDrops draw first, and then ask for the probability and the mode."""
    if site.kind not in (LAYER_DROP, STOCHASTIC_DEPTH):
        return ""
    if not module.training:
        return "eval mode"
    return "p=0" if site.probability == 0 else ""


def _why_probability(probability: float | None) -> str:
    return f"p={probability:g}" if probability in (0.0, 1.0) else "drew nothing"
