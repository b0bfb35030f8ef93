"""How alike gradients are: Pearson's correlation (Hoffer et al. 2020, section 2.1 and Table 1)."""

import torch
from torch import Tensor


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation of pairs of gradients, over their D weights.

    Args:
        a, b: (n, D); the pairs are the rows.

    Returns:
        (n,), from -1 to 1; nan where a gradient is the same number everywhere.

    Raises:
        ValueError: the shapes differ, or are not (n, D).

    >>> pearson(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[5.0, 3.0, 1.0]])).round().tolist()
    [-1.0]
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(
            f"gradients must be two tensors of one shape (n, D), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (a, b))
    norms = torch.linalg.vector_norm(a, dim=1) * torch.linalg.vector_norm(b, dim=1)
    return ((a * b).sum(1) / norms).clamp(-1, 1)
