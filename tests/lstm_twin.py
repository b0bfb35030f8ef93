"""An LSTM written from its equations, one time step after the other: what torch's fused kernels are held against."""

import torch
from torch import Tensor


def lstm(
    x: Tensor, h: Tensor, c: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (rows, T, width), h and c (rows, width) of one layer; gates stand in the order i, f, g, o.

    i, f, o = sigmoid(...), g = tanh(W_g x_t + U_g h_{t-1} + b_g), c_t = f * c_{t-1} + i * g, h_t = o * tanh(c_t)
    """
    outputs = []
    for t in range(x.shape[1]):
        i, f, g, o = (x[:, t] @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, dim=1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h)
    return torch.stack(outputs, dim=1), h, c
