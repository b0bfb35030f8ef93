"""The noise of a gradient while it is trained on: of T from the passes as they run, between samples from two halves."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqba.audit.state import undisturbed
from seqba.context import copies_of_pass
from seqba.draws.generators import mix, seeded_generators
from seqba.repeat import count_samples

_EVERY = 4
_KEY = 0x6E6F697365  # so that no mask of the training is drawn again


class PassNorms:
    """The noise of T in the first batch of every fourth update, from the norms of its passes' gradients.

    With S_p the gradient that pass p of k_p copies adds, P passes, and A their sum over M copies,
        (sum_p ||S_p||^2 / k_p - ||A||^2 / M) / (P - 1)
    is unbiased for the variance of what one copy of the batch adds. Each norm is taken of a weight's gradient on its
    way to be accumulated: nothing is kept, and the gradient is not changed. In an update of small passes that takes up
    to 5 % of its time, hence the fourth.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._squares: dict[int, Tensor] = {}  # copies before the pass -> ||S_p||^2 / k_p
        self._whole: Tensor | None = None  # ||A||^2
        self._copies = 0
        self.is_on = False

    def begin(self, update: int) -> None:
        """Look at this update, or do not."""
        self._squares, self._whole, self._copies, self.is_on = {}, None, 0, update % _EVERY == 0

    @contextmanager
    def of_pass(self, num_copies: int, *, is_first: bool, is_last: bool) -> Iterator[None]:
        """Around one pass over the batch, its backward pass too; one that is done again counts once."""
        if is_first:
            self._squares, self._whole, self._copies = {}, None, 0
        squares: list[Tensor] = []
        wholes: dict[nn.Parameter, Tensor] = {}

        def look(weight: nn.Parameter, gradient: Tensor) -> None:
            squares.append(_norm(gradient))
            if is_last:
                wholes[weight] = squares[-1] if weight.grad is None else _norm(weight.grad + gradient)

        hooks = [weight.register_hook(partial(look, weight)) for weight in self._weights]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if squares:
            self._squares[self._copies] = torch.stack(squares).square().sum() / num_copies
        self._copies += num_copies
        if is_last and squares:
            rest = [_norm(x.grad) for x in self._weights if x not in wholes and x.grad is not None]
            self._whole = torch.stack([*wholes.values(), *rest]).square().sum()

    def within(self, num_samples: int, factor: Tensor | float) -> Tensor | None:
        """s_w^2, 0-dim; None where all copies stood in one pass, or nobody looked.

        Args:
            num_samples: B, in the batch.
            factor: what a copy's mean gradient over the batch was multiplied by before it was accumulated.
        """
        if len(self._squares) < 2 or self._whole is None:
            return None
        spread = sum(self._squares.values()) - self._whole / self._copies
        return num_samples * spread / (len(self._squares) - 1) / factor**2


def noise_of_halves(
    model: nn.Module,
    loss_of: Callable[[int, Tensor], Tensor],
    num_samples: int,
    *,
    copies: tuple[int, int],
    states_of: Sequence[int] | None = None,
    seed: Sequence[int],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """s_w^2 and s_b^2 of one batch, from the gradients of two halves of its samples, each under two draws of T.

    The halves are random, as samples of a batch may be ordered. Costs the forward and backward passes of two copies of
    the batch, and memory for three gradients. Weights, gradients, buffers and generators are left as they were.

    Args:
        model: without the wrappers of data parallelism.
        loss_of: (copy, numbers of samples) -> their mean loss, times `scale`.
        num_samples: B.
        copies: the two draws.
        states_of: the copies whose carried states they take; by default their own.
        seed: the key of what is drawn.
        scale: of the losses.

    Returns:
        Unbiased, 0-dim, float32; nan for a batch of one sample, which has no halves.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    device = weights[0].device
    if num_samples < 2:
        return torch.tensor(float("nan"), device=device), torch.tensor(float("nan"), device=device)
    order = torch.randperm(num_samples, generator=torch.Generator().manual_seed(mix(_KEY, *seed)))
    sums: list[list[Tensor]] = []
    variances, sizes = [], []  # of one draw's mean over the half; samples
    with undisturbed(model), torch.enable_grad():
        for half, rows in enumerate(order.tensor_split(2)):
            squares, total = torch.zeros((), device=device), [torch.zeros_like(p, dtype=torch.float32) for p in weights]
            for copy, state in zip(copies, states_of or copies, strict=True):
                with seeded_generators(_KEY, *seed, half, copy), copies_of_pass((state,), rows=rows):
                    found = torch.autograd.grad(loss_of(copy, rows), weights, allow_unused=True)
                for x, gradient in zip(total, found, strict=True):
                    if gradient is not None:
                        squares += _norm(gradient).square()
                        x += gradient
            variances.append(squares - _square(total) / 2)
            sizes.append(len(rows))
            sums.append(total)
    distance = _square([(x - y) / 2 for x, y in zip(*sums, strict=True)])
    within = (sizes[0] * variances[0] + sizes[1] * variances[1]) / 2
    between = (distance - (variances[0] + variances[1]) / 2) / (1 / sizes[0] + 1 / sizes[1])
    return within / scale**2, between / scale**2


def pick_rows(batch: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """Some samples of a batch, by number.

    Raises:
        ValueError: a tensor without one row for each sample.

    >>> pick_rows({"labels": torch.tensor([5, 6, 7])}, torch.tensor([2, 0]))
    {'labels': tensor([7, 5])}
    """
    size, picked = count_samples(batch), dict(batch)
    for name, x in batch.items():
        if isinstance(x, Tensor) and x.ndim:
            if len(x) != size:
                raise ValueError(
                    f"{name} has {len(x)} rows, not one for each of {size} samples, so that the noise between samples "
                    "cannot be measured; set noise_every to 0"
                )
            picked[name] = x[rows.to(x.device)]
        elif isinstance(x, list) and len(x) == size:
            picked[name] = [x[n] for n in rows.tolist()]
    return picked


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach(), dtype=torch.float32)


def _square(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([_norm(x) for x in parts]).square().sum()
