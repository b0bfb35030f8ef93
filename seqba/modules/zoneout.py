"""Zoneout: units of a recurrent state that keep their previous value."""

import torch.nn.functional as F
from torch import Tensor, nn


def zoneout(previous: Tensor, proposed: Tensor, p: float, training: bool) -> Tensor:
    """Let each unit of a state keep its previous value with probability p.

    In training h_t = z * h_{t-1} + (1 - z) * h'_t with z ~ Bernoulli(p) for each unit, row and time step; at evaluation
    z is its expectation p. Krueger et al. 2017, "Zoneout: Regularizing RNNs by Randomly Preserving Hidden Activations",
    §3. It stands inside the recurrence, between h'_t and the next time step, so it needs a loop over an `nn.LSTMCell`:
    torch's fused LSTM has no place for it.

    Scope of the mask: per element, so that rows, and hence copies, differ.

    Args:
        previous: h_{t-1} (or the cell state c_{t-1}), (rows, width).
        proposed: h'_t, what the cell computes, of the same shape.
        p: probability of keeping the previous value, in [0, 1].
        training: whether to draw; otherwise the expectation is returned.
    """
    # dropout scales the kept differences by 1 / (1 - p) in training and leaves all of them at evaluation
    return previous + (1 - p) * F.dropout(proposed - previous, p, training)


class Zoneout(nn.Dropout):
    """`zoneout` as a layer: two states (rows, width) -> the next one; copies differ.

    Raises:
        ValueError: p outside [0, 1].
    """

    def forward(self, previous: Tensor, proposed: Tensor) -> Tensor:  # type: ignore[override]
        """The state after a time step, each (rows, width)."""
        return zoneout(previous, proposed, self.p, self.training)
