"""Ratios that can be trusted on a noisy machine: two things in turn, A B A B, and the median of the pairs."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """A measured figure; `wanted` is what it should be, `detail` how it came about."""

    name: str
    figure: str
    wanted: str
    detail: str

    def __str__(self) -> str:
        return f"{self.name}: {self.figure} (wanted: {self.wanted})\n    {self.detail}"


@dataclass(frozen=True)
class Ratio:
    """Seconds of A over seconds of B, pair by pair.

    `median` is the figure to quote; `low` and `high` are the quartiles of the pairs.
    """

    median: float
    low: float
    high: float
    seconds_a: float
    seconds_b: float
    pairs: int

    def __str__(self) -> str:
        return (
            f"{self.median:.3f} (quartiles {self.low:.3f} to {self.high:.3f} of {self.pairs} pairs; medians "
            f"{1e3 * self.seconds_a:.1f} ms over {1e3 * self.seconds_b:.1f} ms)"
        )

    def row(self, name: str, wanted: str) -> Row:
        """The ratio as a row."""
        return Row(name, f"{self.median:.3f}", wanted, str(self))


def compare(a: Callable[[], object], b: Callable[[], object], *, pairs: int, warm_up: int = 2) -> Ratio:
    """Time A and B in turn, so that both meet the same drift of the machine's speed; each returns when it has finished.

    At least 2 `pairs` are timed, after `warm_up` pairs that are not.

    >>> compare(lambda: sum(range(9_000)), lambda: sum(range(900)), pairs=5).median > 1
    True
    """
    return compare_seconds(lambda: _seconds(a), lambda: _seconds(b), pairs=pairs, warm_up=warm_up)


def compare_seconds(a: Callable[[], float], b: Callable[[], float], *, pairs: int, warm_up: int = 2) -> Ratio:
    """`compare` of what A and B themselves say that they took, in seconds."""
    if pairs < 2:
        raise ValueError(f"pairs must be at least 2, got {pairs}")
    times = [(a(), b()) for _ in range(warm_up + pairs)][warm_up:]
    low, median, high = statistics.quantiles([first / second for first, second in times], n=4)
    seconds_a, seconds_b = (statistics.median(side) for side in zip(*times, strict=True))
    return Ratio(median, low, high, seconds_a, seconds_b, pairs)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def wait_for_device() -> None:
    """Return when the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
