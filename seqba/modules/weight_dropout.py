"""Weight dropout (DropConnect) on the recurrent matrix of an LSTM, through torch's fused kernels."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqba.modules.mask_scope import MaskScope, check_masks, dropout_masks
from seqba.repeat import unfold

# oneDNN packs the matrices anew in each call, and those of another width up to five times as slowly (1150 against 1152:
# 55 and 12 ms); with a call a copy, that was a tenth of an update
_PACKED_BLOCK = 16

State = tuple[Tensor, Tensor]  # h and c, each (1, rows, width), as of `nn.LSTM`


def weight_dropout(weight: Tensor, p: float, mask_scope: MaskScope, training: bool) -> tuple[Tensor, ...]:
    """Zero single weights with probability p and scale the rest by 1 / (1 - p).

    Wan et al. 2013, "Regularization of Neural Networks using DropConnect"; Merity et al. 2018, §2, on the
    hidden-to-hidden matrices of an LSTM, which are then the same at all time steps.

    Returns:
        One matrix for all rows of the pass (`shared`), or one for each of its copies, in order (`per_copy`); the weight
        itself where nothing is dropped. Gradients reach `weight`, which is never written into.
    """
    if not training or p == 0:
        return (weight,)
    return tuple(weight * mask for mask in dropout_masks(weight, p, mask_scope))


class WeightDropoutLSTM(nn.Module):
    """One LSTM layer whose recurrent matrix is dropped, one mask for all time steps of a forward pass.

    Its parameters are those of `nn.LSTM(input_size, width, batch_first=True)`, by name, shape and initialisation, so
    that a state dict of either loads into the other. The dropped matrix is made anew in each forward pass and handed to
    torch's fused LSTM; no attribute or parameter changes.

    Scope of the mask: `shared`, (4*width, width) for all rows of the pass; `per_copy`, one for each copy's rows, which
    then take one call of the kernel a copy.

    Args:
        input_size: width of the input.
        width: of the output and the state.
        p: probability of zeroing a recurrent weight, in [0, 1).
        mask_scope: whether the copies of a pass share the mask.

    Raises:
        ValueError: p outside [0, 1), or an unknown scope.
    """

    mask_kind = "weight dropout"

    def __init__(self, input_size: int, width: int, p: float, mask_scope: MaskScope = "per_copy") -> None:
        super().__init__()
        check_masks(p, mask_scope)
        self.input_size, self.width, self.p, self.mask_scope = input_size, width, p, mask_scope
        self.weight_ih_l0 = nn.Parameter(torch.empty(4 * width, input_size))
        self.weight_hh_l0 = nn.Parameter(torch.empty(4 * width, width))
        self.bias_ih_l0 = nn.Parameter(torch.empty(4 * width))
        self.bias_hh_l0 = nn.Parameter(torch.empty(4 * width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights from U(-1/sqrt(width), 1/sqrt(width))."""
        bound = 1 / math.sqrt(self.width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def initial_state(self, num_rows: int) -> State:
        """Zeros."""
        zeros = self.weight_hh_l0.new_zeros(1, num_rows, self.width)
        return zeros, zeros

    def forward(self, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Run over the sequences of a window.

        Args:
            x: (rows, T, input_size), copy-major where a pass of copies runs.
            state: h and c before the first time step, each (1, rows, width); zeros by default.

        Returns:
            The outputs (rows, T, width), and the state after the last time step.

        Raises:
            ValueError: `per_copy`, and the rows are no multiple of the pass's copies.
        """
        state = self.initial_state(len(x)) if state is None else state
        block = _PACKED_BLOCK if x.device.type == "cpu" else 1
        more, more_inputs = -self.width % block, -self.input_size % block
        recurrent = weight_dropout(_pad_gates(self.weight_hh_l0, more, more), self.p, self.mask_scope, self.training)
        others = [
            _pad_gates(self.weight_ih_l0, more, more_inputs),
            _pad_gates(self.bias_ih_l0, more),
            _pad_gates(self.bias_hh_l0, more),
        ]
        num_copies = len(recurrent)
        parts = unfold(_pad(x, more_inputs), num_copies)
        hs, cs = (unfold(_pad(part, more), num_copies, dim=1) for part in state)
        runs = [_run(*one, others) for one in zip(parts, hs, cs, recurrent, strict=True)]
        output, h, c = (torch.cat(parts, dim) for parts, dim in zip(zip(*runs, strict=True), (0, 1, 1), strict=True))
        width = self.width
        return output[..., :width], (h[..., :width].contiguous(), c[..., :width].contiguous())

    def extra_repr(self) -> str:
        """Sizes, probability and scope, as `print` shows them."""
        return f"{self.input_size}, {self.width}, p={self.p}, mask_scope={self.mask_scope}"


def _run(x: Tensor, h: Tensor, c: Tensor, recurrent: Tensor, others: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """One call of the fused kernel: output, h and c."""
    weight_ih, bias_ih, bias_hh = others
    weights = [weight_ih, recurrent, bias_ih, bias_hh]
    if x.is_cuda:
        weights = _in_one_chunk(weights)
    # has biases, one layer, no dropout between layers; `train` keeps what a backward pass needs, in eval mode too
    train, bidirectional, batch_first = torch.is_grad_enabled(), False, True
    return torch.lstm(x, (h, c), weights, True, 1, 0.0, train, bidirectional, batch_first)


def _pad(x: Tensor, more: int) -> Tensor:
    """Zeros behind the last axis."""
    return F.pad(x, (0, more)) if more else x


def _pad_gates(weight: Tensor, more: int, more_columns: int = 0) -> Tensor:
    """Zeros for `more` units in each of the four gates, (4*width, ...): such a unit's state and output stay 0."""
    weight = _pad(weight, more_columns)
    if not more:
        return weight
    before = (0, 0) * (weight.dim() - 1)
    return F.pad(weight.unflatten(0, (4, -1)), (*before, 0, more)).flatten(0, 1)


def _in_one_chunk(weights: list[Tensor]) -> list[Tensor]:
    """The same weights as parts of one tensor, in cuDNN's order: it warns, and copies them itself, where they are not.

    The copy is part of the graph: gradients reach the weights.
    """
    flat = torch.cat([weight.flatten() for weight in weights]).split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(flat, weights, strict=True)]
