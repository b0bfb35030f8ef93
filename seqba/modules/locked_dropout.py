"""Locked dropout: one mask for all time steps of a sequence."""

import torch.nn.functional as F
from torch import Tensor, nn


def locked_dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero whole features of a sequence, the same ones at each of its time steps, and scale the rest by 1 / (1 - p).

    Gal and Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks"; Merity
    et al. 2018, "Regularizing and Optimizing LSTM Language Models", §4.1 (variational dropout).

    Scope of the mask: (rows, 1, width), so that rows, and hence copies, differ.

    Args:
        x: (rows, T, width).
        p: probability of zeroing, in [0, 1].
        training: whether to drop at all; otherwise x is returned.

    >>> import torch
    >>> dropped = locked_dropout(torch.ones(2, 5, 3), 0.5, training=True)
    >>> torch.equal(dropped, dropped[:, :1].expand(2, 5, 3))
    True
    """
    return F.dropout1d(x.mT, p, training).mT


class LockedDropout(nn.Dropout):
    """`locked_dropout` as a layer: (rows, T, width) -> the same shape; copies differ.

    Raises:
        ValueError: p outside [0, 1].
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop features of x (rows, T, width) in training mode."""
        return locked_dropout(x, self.p, self.training)
