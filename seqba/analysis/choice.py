"""How many copies are worth it: the M beyond which copies have little noise left to remove."""

import math
from dataclasses import dataclass

from seqba.analysis.variance import NoiseSplit

_LEFT = 0.1


@dataclass(frozen=True)
class CopyChoice:
    """M, and why, in a sentence."""

    num_copies: int
    reason: str


def choose_copies(noise: NoiseSplit, *, most: int, left: float = _LEFT) -> CopyChoice:
    """The least M whose copies leave no more than a share of the noise for further ones to remove.

    A sample's part of the variance is s_b^2 + s_w^2 / M, of which only s_w^2 / M falls with M. M is the least with
        s_w^2 / M <= left * (s_b^2 + s_w^2)
    or `most`. An estimate below 0 counts as 0.

    Args:
        noise: as measured.
        most: the largest M, of memory, time or both.
        left: the share, in (0, 1).

    Raises:
        ValueError: `most` below 1, or `left` outside of (0, 1).

    >>> choose_copies(NoiseSplit(within=9.0, between=3.0), most=16).num_copies
    8
    """
    if most < 1:
        raise ValueError(f"most must be at least 1, got {most}")
    if not 0 < left < 1:
        raise ValueError(f"left must be between 0 and 1, got {left}")
    within, between = max(noise.within, 0.0), max(noise.between, 0.0)
    total = within + between
    if total == 0:
        return CopyChoice(1, "M = 1: the gradient has no noise that was measured")
    wanted = max(1, math.ceil(within / (left * total) - 1e-9))
    chosen = min(wanted, most)
    reason = (
        f"M = {chosen}: T makes {within / total:.0%} of a gradient's noise, and with {chosen} copies "
        f"{within / chosen / total:.0%} is left that more could remove"
    )
    if chosen < wanted:
        reason += f", and {wanted} would leave {within / wanted / total:.0%}, but at most {most} are allowed"
    if between > within:
        reason += "; the noise between samples dominates, so that a larger B serves better than copies"
    return CopyChoice(chosen, reason)
