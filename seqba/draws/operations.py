"""The one place that intercepts random operations: per-copy streams and the mask audit stand on it.

PyTorch tags the aten operations that draw from a generator (`torch.Tag.nondeterministic_seeded`). A
`TorchDispatchMode` sees every one of them below autograd, autocast and the module code, so a model needs no
rewriting for its dropout to be seen, cut into rows or drawn again.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqba.draws.callers import RECURRENT_DROPOUT, Caller, Callers

# How an operation names the shape that it draws, and so how its rows can be cut.
FILL = "fill"  # writes into its first argument: x.bernoulli_(p)
MAP = "map"  # maps tensors row by row: native_dropout(x, p, train), rand_like(x), multinomial(p, n)
FACTORY = "factory"  # makes a tensor of a given `size`: rand(size), randint(high, size)
FUSED_ATTENTION = "fused attention"  # draws inside a kernel, per (row, head, query, key)
CUDNN_RNN = "cuDNN RNN"  # draws inside a kernel, between the layers
PERMUTATION = "permutation"  # randperm(n): has no rows
UNKNOWN = "unknown"

_BASES = {
    FILL: "bernoulli_ uniform_ normal_ exponential_ geometric_ cauchy_ log_normal_ random_ rrelu_with_noise_",
    MAP: "bernoulli native_dropout _fused_dropout poisson binomial multinomial normal rand_like randn_like "
    "randint_like _standard_gamma _sample_dirichlet rrelu_with_noise",
    FACTORY: "rand randn randint",
    FUSED_ATTENTION: "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_flash_attention_for_cpu "
    "_scaled_dot_product_fused_attention_overrideable _flash_attention_forward _efficient_attention_forward",
    CUDNN_RNN: "_cudnn_rnn _cudnn_init_dropout_state miopen_rnn",
    PERMUTATION: "randperm",
}
_KIND_OF_BASE = {base: kind for kind, bases in _BASES.items() for base in bases.split()}
# Random, but without the tag (torch 2.11 to 2.15).
_UNTAGGED = {"random_", "random", "binomial", "_sample_dirichlet"}


@dataclasses.dataclass
class RandomCall:
    """One random operation that a model is about to run.

    Attributes:
        func: the aten overload.
        args, kwargs: its arguments.
        kind: how it names the shape that it draws (the constants of this file).
        row_dim: the axis of its rows.
        packed: inside a recurrent network over a `PackedSequence`, whose rows are interleaved in time.
        caller: the torch function of the model that it is part of, where one is known that can draw.
    """

    func: Any
    args: tuple
    kwargs: dict[str, Any]
    kind: str
    row_dim: int = 0
    packed: bool = False
    caller: Caller | None = None

    @property
    def name(self) -> str:
        """The operation's full name, as in `aten.bernoulli_.float`."""
        return str(self.func)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of what is drawn."""
        if self.kind == FACTORY:
            return tuple(self._size())
        if self.is_nested:
            return (sum(x.numel() for x in self._tensors()[0].unbind()),)
        if self.kind == PERMUTATION:
            return (int(self.args[0]),)
        if self.kind == MAP:
            return tuple(torch.broadcast_shapes(*(x.shape for x in self._tensors())))
        tensor = self._first_tensor()
        return tuple(tensor.shape) if tensor is not None else ()

    @property
    def is_nested(self) -> bool:
        """Whether it draws over a nested tensor, whose rows have no axis."""
        return any(x.is_nested for x in self._tensors()[:1])

    @property
    def device(self) -> torch.device:
        """The device on which the numbers are drawn."""
        tensor = self._first_tensor()
        if tensor is not None:
            return tensor.device
        return torch.device(self.kwargs.get("device") or "cpu")

    @property
    def has_rows(self) -> bool:
        """Whether its first axis can be rows of samples: the one axis of a lone distribution is its classes."""
        return not (self.func._schema.name == "aten::multinomial" and len(self.shape) == 1)

    @property
    def caller_axis(self) -> int | None:
        """The axis of the rows that the running torch function is known to have: recurrent dropout's."""
        return self.row_dim if self.caller is not None and self.caller.kind == RECURRENT_DROPOUT else None

    @property
    def drops_out(self) -> bool:
        """Whether a fused kernel draws at all: it has a probability above 0, and is not told to evaluate."""
        return self.dropout > 0 and self.argument("train") is not False

    @property
    def dropout(self) -> float:
        """The probability of zeroing, of operations that hold one (fused attention, cuDNN)."""
        return float(self.argument("dropout_p", "dropout"))

    def takes_generator(self) -> bool:
        """Whether this overload has a `generator` argument."""
        return any(argument.name == "generator" for argument in self.func._schema.arguments)

    def own_generator(self) -> torch.Generator | None:
        """The generator of its own that the model passed, if any; torch's default one is none."""
        generator = self.argument("generator")
        return None if generator is None or generator._cdata in map(_address, _default_generators()) else generator

    def run(self, generator: torch.Generator | None = None) -> Any:
        """Run the operation whole."""
        if generator is None:
            return self.func(*self.args, **self.kwargs)
        return self.func(*self.args, **{**self.kwargs, "generator": generator})

    def rows(self, start: int, stop: int) -> "RandomCall":
        """The same operation on rows `start` to `stop` alone, each tensor contiguous.

        A fill writes into views of the caller's tensor where they are contiguous; where they are not, it writes
        into a copy, and `write_back` moves it home.
        """
        if self.kind == FACTORY:
            size = list(self._size())
            size[self.row_dim] = stop - start
            return self._with_size(size)
        shape = self.shape
        dim = self.row_dim - len(shape)  # from behind, as arguments of fewer axes are aligned

        def cut(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.ndim < -dim or x.shape[dim] != shape[dim]:
                return x
            return _aligned(x.narrow(dim, start, stop - start))

        args = tuple(cut(x) for x in self.args)
        return dataclasses.replace(self, args=args, kwargs={key: cut(x) for key, x in self.kwargs.items()})

    def write_back(self, part: "RandomCall", start: int) -> None:
        """Copy what a part of a fill drew into the caller's tensor, where it was drawn elsewhere."""
        for argument, whole, drawn in zip(self.func._schema.arguments, self.args, part.args, strict=False):
            if argument.alias_info is None or not isinstance(whole, Tensor):
                continue
            home = whole.narrow(self.row_dim, start, drawn.shape[self.row_dim])
            if home.data_ptr() != drawn.data_ptr():
                home.copy_(drawn)

    def argument(self, *names: str) -> Any:
        """The value of the first argument with one of these names, given or by default; None without any."""
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.name in names:
                if position < len(self.args):
                    return self.args[position]
                return self.kwargs.get(argument.name, argument.default_value)
        return None

    def _tensors(self) -> list[Tensor]:
        return [x for x in (*self.args, *self.kwargs.values()) if isinstance(x, Tensor)]

    def _first_tensor(self) -> Tensor | None:
        return next(iter(self._tensors()), None)

    def _size_position(self) -> int:
        return next(i for i, argument in enumerate(self.func._schema.arguments) if argument.name == "size")

    def _size(self) -> list[int]:
        position = self._size_position()
        return self.args[position] if position < len(self.args) else self.kwargs["size"]

    def _with_size(self, size: list[int]) -> "RandomCall":
        position = self._size_position()
        if position < len(self.args):
            return dataclasses.replace(self, args=(*self.args[:position], size, *self.args[position + 1 :]))
        return dataclasses.replace(self, kwargs={**self.kwargs, "size": size})


def _aligned(x: Tensor) -> Tensor:
    """Contiguous and, on an accelerator, aligned as a fresh tensor is: kernels pick their vector width by it."""
    if x.is_contiguous() and (x.device.type == "cpu" or x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _address(generator: torch.Generator) -> int:
    """Which generator it is: a dispatch mode is handed other Python objects of the same."""
    return generator._cdata  # type: ignore[attr-defined]


def _default_generators() -> list[torch.Generator]:
    on_gpu = list(torch.cuda.default_generators) if torch.cuda.is_initialized() else []
    return [torch.default_generator, *on_gpu]


def kind_of(func: Any) -> str | None:
    """How an aten overload draws, or None where it draws nothing.

    >>> kind_of(torch.ops.aten.bernoulli_.float), kind_of(torch.ops.aten.randint.low)
    ('fill', 'factory')
    >>> kind_of(torch.ops.aten.add.Tensor) is None
    True
    """
    base = func._schema.name.partition("::")[2]
    if torch.Tag.nondeterministic_seeded not in func.tags and base not in _UNTAGGED:
        return None
    if base.endswith("_backward"):  # replays the forward pass's numbers, draws none
        return None
    kind = _KIND_OF_BASE.get(base, UNKNOWN)
    names = [argument.name for argument in func._schema.arguments]
    if "out" in names:
        return UNKNOWN
    if kind == MAP and "size" in names:  # normal(mean: float, std: float, size)
        return FACTORY
    return kind


class RandomOps(TorchDispatchMode):
    """Sees each random operation that runs inside the `with` block, and decides how it is run.

    Subclasses override `on_draw`. What only the Python level shows (a dropout's probability, that a draw stands
    between the layers of a recurrent network) is added by a function mode, entered with this one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[Any, str | None] = {}
        self._num_draws = 0
        self._callers = Callers(lambda: self._num_draws, self.on_return)

    def on_draw(self, call: RandomCall) -> Any:
        """Run `call`, or something else in its place; the result goes to the model."""
        return call.run()

    def on_return(self, caller: Caller, num_draws: int) -> None:
        """A torch function of the model that can draw has returned, after so many draws (0: it is switched off)."""

    def __enter__(self) -> "RandomOps":
        self._callers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._callers.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        try:
            kind = self._kinds[func]
        except KeyError:
            kind = self._kinds[func] = kind_of(func)
        if kind is None:
            return func(*args, **kwargs)
        if kind == UNKNOWN and func._can_decompose():  # aten.dropout itself, seen under inference_mode
            with self:
                return func.decompose(*args, **kwargs)
        caller = self._callers.running
        call = RandomCall(func, args, kwargs, kind, caller=caller)
        if caller is not None:
            call.row_dim, call.packed = caller.row_dim, caller.packed
        self._num_draws += kind not in (FUSED_ATTENTION, CUDNN_RNN) or call.drops_out
        return self.on_draw(call)
