"""Learning rates as pure functions of the update: lr = f(update), counted from 1.

They know no optimizer, no epoch and no number of copies M: the rate must not move with M. Two ways to use one, the same
on any number of ranks as long as nothing is given to `Accelerator.prepare` (which would advance it once per process):

    for group in optimizer.param_groups:  # before update number `update`
        group["lr"] = inverse_sqrt(update, peak_lr=5e-4, warmup_updates=4_000)

    # LambdaLR counts from 0 and multiplies, so the optimizer is made with lr=1
    scheduler = LambdaLR(optimizer, lambda t: inverse_sqrt(t + 1, peak_lr=5e-4, warmup_updates=4_000))
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence


def inverse_sqrt(update: int, *, peak_lr: float, warmup_updates: int) -> float:
    """Linear warm-up to the peak, then decay by the inverse square root of the update.

        lr(t) = peak_lr * min(t / W, sqrt(W / t)),    W = warmup_updates

    `transformer` written by its peak: the same curve where peak_lr = scale * (width * W)^-0.5.
    Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), Eq. 3.

    Args:
        update: t, counted from 1.
        peak_lr: the rate at update W, the largest; at least 0.
        warmup_updates: W, at least 1 (it is also the time scale of the decay).

    Raises:
        ValueError: an argument outside its range.

    >>> [round(inverse_sqrt(t, peak_lr=0.8, warmup_updates=4), 4) for t in (1, 3, 4, 5, 16)]
    [0.2, 0.6, 0.8, 0.7155, 0.4]
    """
    _check_update(update)
    _check_rate("peak_lr", peak_lr)
    _check_count("warmup_updates", warmup_updates, minimum=1)
    return peak_lr * min(update / warmup_updates, math.sqrt(warmup_updates / update))


def transformer(update: int, *, width: int, warmup_updates: int, scale: float = 1.0) -> float:
    """The Transformer's rate, set by its width instead of by a peak.

        lr(t) = scale * width^-0.5 * min(t^-0.5, t * W^-1.5),    W = warmup_updates

    Vaswani et al. 2017, "Attention Is All You Need" (arXiv:1706.03762), Eq. 3; there width 512 and W 4000, with its
    peak of 7.0e-4 at update W.

    Args:
        update: t, counted from 1.
        width: of the model (D), at least 1.
        warmup_updates: W, at least 1.
        scale: a factor on the whole curve, at least 0.

    Raises:
        ValueError: an argument outside its range.

    >>> [f"{transformer(t, width=512, warmup_updates=4_000):.2e}" for t in (1, 4_000, 4_001, 100_000)]
    ['1.75e-07', '6.99e-04', '6.99e-04', '1.40e-04']
    """
    _check_update(update)
    _check_count("width", width, minimum=1)
    _check_count("warmup_updates", warmup_updates, minimum=1)
    _check_rate("scale", scale)
    return scale * width**-0.5 * min(update**-0.5, update * warmup_updates**-1.5)


def linear(update: int, *, peak_lr: float, warmup_updates: int, total_updates: int, final_lr: float = 0.0) -> float:
    """Linear warm-up to the peak, then a straight line down to the last update.

        lr(t) = peak_lr * t / W                                            t <= W = warmup_updates
        lr(t) = final_lr + (peak_lr - final_lr) * (T - t) / (T - W)        W <= t <= T = total_updates
        lr(t) = final_lr                                                   t >= T

    Update T itself has the final rate; so has every later one (a scheduler looks one update ahead at the end).
    Devlin et al. 2019, "BERT" (arXiv:1810.04805), appendix A.2.

    Args:
        update: t, counted from 1.
        peak_lr: the rate at update W, the largest; at least 0.
        warmup_updates: W, at least 0; 0 starts on the way down.
        total_updates: T, above W.
        final_lr: from 0 to `peak_lr`.

    Raises:
        ValueError: an argument outside its range.

    >>> [linear(t, peak_lr=0.5, warmup_updates=2, total_updates=6) for t in (1, 2, 3, 6, 7)]
    [0.25, 0.5, 0.375, 0.0, 0.0]
    """
    return _decay(lambda left: left, update, peak_lr, warmup_updates, total_updates, final_lr)


def cosine(update: int, *, peak_lr: float, warmup_updates: int, total_updates: int, final_lr: float = 0.0) -> float:
    """Linear warm-up to the peak, then half a cosine down to the last update.

        lr(t) = peak_lr * t / W                                                        t <= W = warmup_updates
        lr(t) = final_lr + (peak_lr - final_lr) * (1 + cos(pi * (t - W) / (T - W))) / 2    W <= t <= T
        lr(t) = final_lr                                                               t >= T = total_updates

    Loshchilov and Hutter 2017, "SGDR" (arXiv:1608.03983), Eq. 5, without restarts. Arguments and errors as of `linear`.

    >>> [round(cosine(t, peak_lr=0.5, warmup_updates=2, total_updates=6), 4) for t in (1, 2, 3, 4, 6, 7)]
    [0.25, 0.5, 0.4268, 0.25, 0.0, 0.0]
    """
    return _decay(
        lambda left: (1 - math.cos(math.pi * left)) / 2, update, peak_lr, warmup_updates, total_updates, final_lr
    )


def constant(update: int, *, peak_lr: float, warmup_updates: int = 0) -> float:
    """Linear warm-up to the peak, then the peak.

        lr(t) = peak_lr * min(1, t / W),    W = warmup_updates

    Args:
        update: t, counted from 1.
        peak_lr: the rate from update W on; at least 0.
        warmup_updates: W, at least 0; 0 is the peak from the first update on.

    Raises:
        ValueError: an argument outside its range.

    >>> [constant(t, peak_lr=0.5, warmup_updates=2) for t in (1, 2, 3)]
    [0.25, 0.5, 0.5]
    """
    _check_update(update)
    _check_rate("peak_lr", peak_lr)
    _check_count("warmup_updates", warmup_updates, minimum=0)
    return peak_lr * min(update, warmup_updates) / warmup_updates if warmup_updates else peak_lr


def step_decay(
    update: int, *, base_lr: float, boundaries: Sequence[int], factor: float | Sequence[float], warmup_updates: int = 0
) -> float:
    """A staircase: the rate is multiplied by `factor` after each boundary.

        lr(t) = base_lr * (product of factor_i over the boundaries i below t) * min(1, t / W),    W = warmup_updates

    A boundary is the last update of its step: update b still has the old rate, b + 1 the new one. In epochs of U
    updates, "divide by 10 at epoch 81" is the boundary 81 * U with factor 0.1.
    Hoffer et al. 2020, "Augment Your Batch" (arXiv:1901.09335), the image regimes of Table 2; warm-up as in
    Goyal et al. 2017 (arXiv:1706.02677).

    Args:
        update: t, counted from 1.
        base_lr: the rate up to the first boundary; at least 0.
        boundaries: updates, at least 1 each, strictly rising; empty is a constant rate.
        factor: above 0 and at most 1; one for all boundaries, or one for each.
        warmup_updates: W, at least 0; 0 is none.

    Raises:
        ValueError: an argument outside its range.

    >>> [step_decay(t, base_lr=0.5, boundaries=[2, 4], factor=0.5) for t in (1, 2, 3, 4, 5)]
    [0.5, 0.5, 0.25, 0.25, 0.125]
    """
    _check_update(update)
    _check_rate("base_lr", base_lr)
    if any(b < 1 for b in boundaries) or any(a >= b for a, b in itertools.pairwise(boundaries)):
        raise ValueError(f"boundaries must be updates of at least 1, strictly rising, got {list(boundaries)}")
    factors = [factor] * len(boundaries) if isinstance(factor, (int, float)) else factor
    if len(factors) != len(boundaries):
        raise ValueError(f"factor must be one number, or one for each of {len(boundaries)} boundaries, got {factor}")
    if not all(0 < x <= 1 for x in factors):
        raise ValueError(f"factor must be above 0 and at most 1, got {factor}")
    dropped = math.prod(x for x, boundary in zip(factors, boundaries, strict=True) if boundary < update)
    return constant(update, peak_lr=base_lr, warmup_updates=warmup_updates) * dropped


def _decay(
    shape: Callable[[float], float], update: int, peak_lr: float, warmup: int, total: int, final_lr: float
) -> float:
    """Warm up, then fall by `shape` of the share of the way down that is left: 1 at W, 0 from T on."""
    rate = constant(update, peak_lr=peak_lr, warmup_updates=warmup)
    if total <= warmup:
        raise ValueError(
            f"total_updates must be above warmup_updates={warmup}, got {total}: train longer or warm up less"
        )
    if not 0 <= final_lr <= peak_lr:
        raise ValueError(f"final_lr must be from 0 to peak_lr={peak_lr}, got {final_lr}")
    if update < warmup:
        return rate
    return final_lr + (peak_lr - final_lr) * shape(max(total - update, 0) / (total - warmup))


def _check_update(update: int) -> None:
    if not update >= 1:
        raise ValueError(f"update is counted from 1, got {update}")


def _check_count(name: str, value: int, *, minimum: int) -> None:
    if not value >= minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")


def _check_rate(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
