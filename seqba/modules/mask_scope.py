"""Masks that have no rows: one for all copies of a pass, or one for each.

A mask over weights or over the vocabulary is drawn once a forward pass. In a fused batch a plain repeat therefore gives
all copies of a sample the same one, where copies in passes of their own would each draw another: `shared`. With
`per_copy`, each copy has its own whichever pass it stands in.
"""

from contextlib import nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from seqba.context import current_copies, shared_draws

MaskScope = Literal["shared", "per_copy"]


def dropout_masks(like: Tensor, p: float, mask_scope: MaskScope) -> Tensor:
    """Draw dropout masks of the shape of `like`: 0 with probability p, else 1 / (1 - p), so that the mean is 1.

    Returns:
        (n, *like.shape), of the dtype and on the device of `like`; n is 1 for `shared` (drawn inside `shared_draws`),
        and for `per_copy` the number of copies in the running pass, in their order (1 where no pass runs).

    >>> from seqba import copies_of_pass
    >>> with copies_of_pass((0, 1, 2)):
    ...     [dropout_masks(torch.ones(5, 2), 0.5, scope).shape[0] for scope in ("shared", "per_copy")]
    [1, 3]
    """
    num_masks = 1 if mask_scope == "shared" else len(current_copies() or (0,))
    with shared_draws() if mask_scope == "shared" else nullcontext():
        # a quarter of the time of `bernoulli_` on CPU; not in half precision, whose numbers are too coarse for p
        uniform = torch.rand(num_masks, *like.shape, dtype=torch.float32, device=like.device)
    return uniform.ge_(p).div_(1 - p).to(like.dtype)


def check_masks(p: float, mask_scope: str) -> None:
    """Refuse a probability outside [0, 1) and an unknown scope, by ValueError."""
    if not 0 <= p < 1:
        raise ValueError(f"the probability of zeroing must be in [0, 1), got {p}; 0 switches the dropout off")
    if mask_scope not in get_args(MaskScope):
        raise ValueError(f"mask_scope must be one of {', '.join(get_args(MaskScope))}, got {mask_scope!r}")
