"""The torch functions that can draw random numbers, as a model calls them: `random_ops` learns from them.

Below, at the operations that draw, a dropout is a `bernoulli_` on some tensor, and a dropout that is switched off is
nothing at all. The Python-level call still knows its probability and whether it trains.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, int64, nn
from torch.overrides import TorchFunctionMode

DROPOUT = "dropout"
WEIGHT_DROPOUT = "weight dropout"  # DropConnect: the dropped tensor is a parameter
ATTENTION_DROPOUT = "attention dropout"
RECURRENT_DROPOUT = "recurrent dropout"  # between the layers of nn.LSTM, nn.GRU and nn.RNN


@dataclass(frozen=True)
class Caller:
    """A call of a torch function that can draw.

    Attributes:
        kind: what it is in the field's words.
        probability: of zeroing, or None where the function has none.
        training: whether it was told to train.
        row_dim: the axis of its rows: 0, but 1 in recurrent networks, which draw (T, rows, H) between their layers
            whatever `batch_first` says.
        packed: it runs a recurrent network over a `PackedSequence`, whose rows are interleaved in time.
    """

    kind: str
    probability: float | None
    training: bool
    row_dim: int = 0
    packed: bool = False


@dataclass(frozen=True)
class _Signature:
    """Where a function takes its probability and its training flag: the names, and the position if not by name."""

    kind: str
    probability: tuple[int, float] | None  # position, default
    training: tuple[int, bool] | None

    def caller(self, args: tuple, kwargs: dict[str, Any]) -> Caller:
        probability, training = None, True
        if self.probability is not None:
            probability = float(_value(args, kwargs, ("p", "dropout_p"), *self.probability))
        if self.training is not None:
            training = bool(_value(args, kwargs, ("training", "train"), *self.training))
        kind = self.kind
        if kind == DROPOUT and isinstance(_value(args, kwargs, ("input",), 0, None), nn.Parameter):
            kind = WEIGHT_DROPOUT
        return Caller(kind, probability, training)


_SIGNATURES = {
    **{
        name: _Signature(DROPOUT, (1, 0.5), (2, True))
        for name in (
            *("dropout", "dropout_", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "feature_dropout_"),
            *("alpha_dropout", "alpha_dropout_", "feature_alpha_dropout", "feature_alpha_dropout_"),
        )
    },
    "scaled_dot_product_attention": _Signature(ATTENTION_DROPOUT, (4, 0.0), None),
    "multi_head_attention_forward": _Signature(ATTENTION_DROPOUT, (10, 0.0), (13, True)),
    "rrelu": _Signature("rrelu", None, (3, False)),
    "rrelu_": _Signature("rrelu", None, (3, False)),
    "gumbel_softmax": _Signature("Gumbel softmax", None, None),
}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def caller_of(func: Any, args: tuple, kwargs: dict[str, Any]) -> Caller | None:
    """The draws of a call of a torch function, or None where it draws nothing.

    >>> caller_of(nn.functional.dropout, (), {"p": 0.2, "training": True})
    Caller(kind='dropout', probability=0.2, training=True, row_dim=0, packed=False)
    """
    name = getattr(func, "__name__", None)
    if name in _RECURRENT:
        return _recurrent(args)
    signature = _SIGNATURES.get(name) if name is not None else None
    return None if signature is None else signature.caller(args, kwargs)


def _recurrent(args: tuple) -> Caller | None:
    # (data, batch_sizes, hx, weights, bias, layers, dropout, train, ...) where the sequence is packed, else
    # (input, hx, weights, bias, layers, dropout, train, ...)
    packed = len(args) > 1 and isinstance(args[1], Tensor) and args[1].dtype == int64
    num_layers, probability, training = args[5:8] if packed else args[4:7]
    if num_layers == 1:  # nothing lies between the layers
        return None
    return Caller(RECURRENT_DROPOUT, float(probability), bool(training), row_dim=0 if packed else 1, packed=packed)


def _value(args: tuple, kwargs: dict[str, Any], names: tuple[str, ...], position: int, default: Any) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
    return args[position] if position < len(args) else default


class Callers(TorchFunctionMode):
    """Knows which torch function that can draw is running; tells each one's end, with how much it drew.

    Args:
        num_draws: counts the draws so far.
        on_return: is told the call and its number of draws when it has returned.
    """

    def __init__(self, num_draws: Callable[[], int], on_return: Callable[[Caller, int], None]) -> None:
        super().__init__()
        self.running: Caller | None = None
        self._num_draws = num_draws
        self._on_return = on_return

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        caller = caller_of(func, args, kwargs)
        if caller is None:
            return func(*args, **kwargs)
        before, self.running = self._num_draws(), caller
        try:
            result = func(*args, **kwargs)
        finally:
            self.running = None
        self._on_return(caller, self._num_draws() - before)
        return result
