"""The loss of an output layer, a slice of tokens at a time, its gradients computed in the forward pass.

A loss is the last thing that a forward pass computes, so the gradients with respect to its inputs can be had
while a slice's probabilities are at hand; what remains for the backward pass is a product with one number. Against
making the logits again there, that saves one of four matrix products, and against keeping them it saves their memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class SlicedLoss(torch.autograd.Function):
    """Summed, smoothed nats of `F.linear(hidden, weight, bias)`, never more than `rows` rows of logits in memory.

    `apply(hidden, weight, bias, labels, ignore_index, label_smoothing, rows, dtype)`: hidden (N, D), weight (V, D),
    bias (V,) or None, labels (N,); `rows` of a slice; `dtype` of the matrix products. The rest is done, and gradients
    are added up, in float32 (float64 for float64). It has no second derivatives: asked for them, it raises.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        label_smoothing: float,
        rows: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """The loss; the gradients are kept for `backward` where they will be wanted."""
        master = torch.promote_types(dtype, torch.float32)
        wants = ctx.needs_input_grad[:3]
        grads = [
            torch.zeros_like(x, dtype=master, memory_format=torch.contiguous_format)
            if x is not None and wanted
            else None
            for x, wanted in zip((hidden, weight, bias), wants, strict=True)
        ]
        low_weight, low_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        nll = torch.zeros((), dtype=master, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, labels.numel(), rows):
                part = slice(start, start + rows)
                low_hidden = hidden[part].to(dtype)
                log_p = F.log_softmax(F.linear(low_hidden, low_weight, low_bias), dim=-1, dtype=master)
                kept = (labels[part] != ignore_index).unsqueeze(-1)
                ids = labels[part].unsqueeze(-1).clamp(min=0)
                nll -= (kept * _smoothed(log_p, ids, label_smoothing)).sum()
                if any(wants):
                    grad = _minus_target(log_p.exp_(), ids, label_smoothing).mul_(kept)
                    _add_gradients(grads, part, grad, low_hidden, low_weight)
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return nll

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """The kept gradients, times the one that arrives."""
        if torch.is_grad_enabled():  # create_graph=True: its second derivatives would silently be missing
            raise RuntimeError(
                "linear_cross_entropy keeps no graph of its gradient, so create_graph=True would give wrong second "
                "derivatives; use token_cross_entropy on the logits"
            )
        grads = [
            None if grad is None else (grad * grad_output).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, None, None, None, None, None)


def _smoothed(log_p: Tensor, ids: Tensor, label_smoothing: float) -> Tensor:
    """sum_v q_v log p_v of each row, (n, 1)."""
    at_label = log_p.gather(-1, ids)
    if label_smoothing == 0.0:
        return at_label
    return (1 - label_smoothing) * at_label + label_smoothing * log_p.mean(dim=-1, keepdim=True)


def _minus_target(p: Tensor, ids: Tensor, label_smoothing: float) -> Tensor:
    """p - q in the memory of p: the gradient of a row's loss with respect to its logits."""
    if label_smoothing:
        p -= label_smoothing / p.shape[-1]
    return p.scatter_add_(-1, ids, torch.full_like(ids, -(1 - label_smoothing), dtype=p.dtype))


def _add_gradients(
    grads: list[Tensor | None], part: slice, grad: Tensor, low_hidden: Tensor, low_weight: Tensor
) -> None:
    """Add what a slice, with this gradient of its logits, gives to those of hidden, weight and bias."""
    of_hidden, of_weight, of_bias = grads
    if of_bias is not None:
        of_bias += grad.sum(0)  # before it is rounded
    grad = grad.to(low_weight.dtype)
    if of_hidden is not None:
        of_hidden[part] = grad @ low_weight
    if of_weight is not None:
        of_weight += grad.t() @ low_hidden
