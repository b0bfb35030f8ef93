"""Token cross-entropy in summed nats, label-smoothed, and memory-lean through the output layer.

Losses here are sums, never means: the step divides once by the number of target tokens of all copies,
passes and ranks (`count_targets`), so that the number of copies never changes the size of the gradient.

Label smoothing (Szegedy et al. 2016, "Rethinking the Inception Architecture for Computer Vision", §7; Vaswani
et al. 2017, "Attention Is All You Need", §5.4, with eps = 0.1) replaces the one-hot target y by
    q_v = (1 - eps) * [v = y] + eps / V,      sum_v q_v = 1,
so the loss of a token is
    -sum_v q_v log p_v = (1 - eps) * (-log p_y) + eps * mean_v(-log p_v),
which is log V for uniform logits whatever eps is. A mass of eps on top of the one-hot, or one spread over V - 1
classes and the label both, would not be.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqba.sliced_loss import SlicedLoss

IGNORE_INDEX = -100

# Rows of logits that the lean path holds at once: 256 fill a matrix product (fewer were up to twice as slow),
# and at most 16 slices keep the launches few, so the logits in memory are max(256, N / 16) rows of N.
_MIN_ROWS = 256
_MAX_SLICES = 16
# Logits of fewer numbers than this (64 MB in float32) are simply made: nobody misses that memory, and below it
# slices in bfloat16 took up to 1.6 times the time of the plain way, above it 0.6 to 1.0 times.
_MIN_LOGITS = 2**24


def count_targets(labels: Tensor) -> Tensor:
    """Number of labels that are trained on, i.e. not -100: the denominator of a summed loss.

    Args:
        labels: token ids of any shape, -100 where ignored.

    Returns:
        int64, 0-dim, on the device of `labels` (nothing waits for it).

    >>> count_targets(torch.tensor([[7, 8, -100], [9, -100, -100]]))
    tensor(3)
    """
    return (labels != IGNORE_INDEX).sum()


def token_cross_entropy(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Label-smoothed cross-entropy of logits, summed in nats over every label that is not -100.

        sum_i (1 - eps) * (-log p_i[y_i]) + eps * mean_v(-log p_i[v]),    p_i = softmax(logits_i)

    Args:
        logits: (..., V); half precision is summed in float32.
        labels: (...), int64 in [0, V), or -100 where ignored.
        label_smoothing: eps in [0, 1), the mass taken from the label and spread evenly over all V classes.

    Returns:
        0-dim, float32 (float64 for float64 logits); 0 where every label is ignored.

    Raises:
        ValueError: eps outside [0, 1), labels not int64, or of another shape than the logits' rows.
        IndexError: a label outside the vocabulary (on CPU; a GPU is not waited for).

    Uniform logits cost log V a token, smoothed or not:
    >>> token_cross_entropy(torch.zeros(2, 8), torch.tensor([5, -100]), label_smoothing=0.1)
    tensor(2.0794)
    """
    _check(label_smoothing, logits.shape[:-1], logits.shape[-1], labels)
    return _summed_nll(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), label_smoothing)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """`token_cross_entropy(F.linear(hidden, weight, bias), labels)` without the (N, V) logits in memory.

    With N tokens, the logits and their gradient are the largest tensors of a training step. Here they exist for
    a slice of max(256, N / 16) tokens at a time. Two ways, both exact, chosen by a rule that can be read here:

    - *plain*, all logits at once, where slices save little: fewer than 512 tokens, fewer than 2^24 logits, or
      V <= D; and under `torch.func` transforms (per-sample gradients) and `torch.compile`, which the other way
      does not support;
    - *sliced* (`seqba.sliced_loss`): slice by slice, the gradients computed in the forward pass. Matrix products are
      done in the dtype that `F.linear` would use (autocast's, if it is on), all else in float32 or better.

    The sliced way has no second derivatives, and raises where they are asked for (`create_graph=True`): call
    `token_cross_entropy` on the logits for those.

    Args:
        hidden: (..., D), what enters the output layer.
        weight: (V, D), the output layer; it may be tied to an embedding, or frozen.
        labels: (...), int64 in [0, V), or -100 where ignored; an ignored position has no influence at all.
        bias: (V,) or (1, V) (Marian's `final_logits_bias`).
        label_smoothing: eps in [0, 1), see `token_cross_entropy`.

    Returns:
        Summed nats, 0-dim, float32 (float64 for float64 inputs).

    Raises:
        ValueError: eps outside [0, 1); shapes or dtypes that do not fit together.
        IndexError: a label outside the vocabulary (on CPU; a GPU is not waited for).

    >>> linear_cross_entropy(torch.zeros(2, 3, 4), torch.ones(8, 4), torch.full((2, 3), 5)) / 6
    tensor(2.0794)
    """
    if weight.dim() != 2 or weight.shape[1:] != hidden.shape[-1:]:
        raise ValueError(f"hidden {_shape(hidden)} and weight {_shape(weight)} must be (..., D) and (V, D)")
    vocab_size, width = weight.shape
    if bias is not None and tuple(bias.shape) not in {(vocab_size,), (1, vocab_size)}:
        raise ValueError(f"bias must be ({vocab_size},) or (1, {vocab_size}), got {_shape(bias)}")
    _check(label_smoothing, hidden.shape[:-1], vocab_size, labels)
    dtype = _linear_dtype(hidden, weight, bias)

    hidden, labels = hidden.reshape(-1, width), labels.reshape(-1)
    bias = None if bias is None else bias.reshape(-1)
    hidden, labels = _without_ignored(hidden, labels)
    num_rows = labels.numel()
    is_small = num_rows < 2 * _MIN_ROWS or num_rows * vocab_size < _MIN_LOGITS or vocab_size <= width
    if is_small or _is_transformed():
        return _summed_nll(F.linear(hidden, weight, bias), labels, label_smoothing)
    rows = max(_MIN_ROWS, -(-num_rows // _MAX_SLICES))
    # Torch has a chunked function too (2.13), but in half precision it returns the sum itself in 16 bits (1 % off
    # after 2 000 tokens in bfloat16, infinite over 65 504 nats in float16), rounds the incoming gradient, i.e. the
    # 1 / tokens of the step, and adds up its chunks' weight gradients in 16 bits; with smoothing it keeps all logits.
    nll: Tensor = SlicedLoss.apply(hidden, weight, bias, labels, IGNORE_INDEX, label_smoothing, rows, dtype)
    return nll


def _summed_nll(logits: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """logits (N, V), labels (N,) -> summed nats; torch's smoothing mass is the one of this module, 1 in all."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing)


def _without_ignored(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Ignored rows leave where that saves their work, and become zeros where it would cost a wait.

    Zeros, as their gradient is only multiplied by 0 later, which would let a NaN in padding through.
    """
    kept = labels != IGNORE_INDEX
    if not _can_drop_rows(hidden):
        return hidden.masked_fill(~kept.unsqueeze(-1), 0.0), labels
    if bool(kept.all()):
        return hidden, labels
    return hidden[kept], labels[kept]


def _can_drop_rows(hidden: Tensor) -> bool:
    """Elsewhere the host would have to wait for the device to know how many rows are left."""
    return hidden.device.type == "cpu" and not _is_transformed()


def _linear_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype that `F.linear` computes in here: autocast's, if it is on, and else that of its inputs."""
    device = hidden.device.type
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # Autocast leaves float64 alone.
        dtypes = {x if x == torch.float64 else torch.get_autocast_dtype(device) for x in dtypes}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(x) for x in dtypes))
        raise ValueError(f"hidden, weight and bias must have one dtype outside autocast, got {names}")
    return dtypes.pop()


def _is_transformed() -> bool:
    """Whether `torch.func` or a compiler runs this code, in which values cannot be looked at."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def _check(label_smoothing: float, rows: torch.Size, vocab_size: int, labels: Tensor) -> None:
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if labels.shape != rows:
        raise ValueError(f"labels must be {tuple(rows)}, one a row of V values, got {_shape(labels)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if labels.device.type == "cpu" and labels.numel() and not _is_transformed():
        wrong = labels[(labels != IGNORE_INDEX) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise IndexError(
                f"label {int(wrong[0])} is outside the vocabulary of {vocab_size} and is not {IGNORE_INDEX}"
            )


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
