"""Activation regularisation (AR) and its temporal kind (TAR), in the currency of a summed loss.

Merity et al. 2017, "Revisiting Activation Regularization for Language RNNs", penalise large outputs and large steps
between outputs. AWD-LSTM (Merity et al. 2018) adds to the mean loss of a target
    alpha * mean(h_dropped^2) + beta * mean((h_{t+1} - h_t)^2)
with means over all elements. Losses here are sums over targets that the step divides once by their number. So both
terms are given times the number of targets in the rows: divided with the loss they are the paper's, and passes over
copies of the same samples add up to what one pass over all of them gives.
"""

import torch
from torch import Tensor


def activation_regularisation(output: Tensor, num_targets: int | Tensor) -> Tensor:
    """AR: num_targets * mean(h^2), to be weighted by alpha.

    Args:
        output: (rows, T, width), the last layer's output after its dropout.
        num_targets: of these rows.

    Returns:
        0-dim, float32 (float64 for float64).

    >>> activation_regularisation(torch.full((2, 3, 5), 2.0), num_targets=6) / 6
    tensor(4.)
    """
    return num_targets * _mean_square(output)


def temporal_activation_regularisation(output: Tensor, num_targets: int | Tensor) -> Tensor:
    """TAR: num_targets * mean((h_{t+1} - h_t)^2), to be weighted by beta; 0 for a single time step.

    Args:
        output: (rows, T, width), the last layer's output before its dropout.
        num_targets: of these rows.

    Returns:
        0-dim, float32 (float64 for float64).
    """
    return num_targets * _mean_square(output[:, 1:] - output[:, :-1])


def _mean_square(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum() / max(1, x.numel())
