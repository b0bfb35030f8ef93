"""Paired bootstrap of a ratio of sums over lines, such as bits per byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.floating[Any] | np.integer[Any]]

_PICKED = 2**22  # lines of the resamples that are summed at once


@dataclass(frozen=True)
class Difference:
    """How a model's figure differs from the first model's (its own minus the first's), by paired bootstrap.

    `value` is the figure on the text; 95 % of the resamples' differences lie from `low` to `high`. `p_value` is the
    chance of a difference at least this large, either way, if both were equally good.
    """

    model: str
    value: float
    difference: float
    low: float
    high: float
    p_value: float


def paired_bootstrap(amounts: Mapping[str, Values], sizes: Values, *, num_samples: int, seed: int) -> list[Difference]:
    """Compare every model with the first on the figure sum(amounts) / sum(sizes) of a text, by resampling its lines.

    Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation": a resample has as many lines as the
    text, drawn from it with replacement, the same ones for all models. With d the difference on the text and d_r that
    on resample r of R,

        p = (1 + #{r: |d_r - mean(d)| >= |d|}) / (1 + R)

    as in sacreBLEU. A line that no model scores is drawn as any other.

    Args:
        amounts: by model, of each line, (lines,), such as bits.
        sizes: of each line, (lines,), above 0, such as bytes.
        num_samples: R.
        seed: of the draws.

    Raises:
        ValueError: fewer than two models, no line, or numbers of lines that differ.
    """
    if len(amounts) < 2 or not len(sizes) or any(amount.shape != sizes.shape for amount in amounts.values()):
        shapes = ", ".join(str(amount.shape) for amount in amounts.values())
        raise ValueError(f"at least two models and a line are needed, got amounts {shapes} and sizes {sizes.shape}")
    draw, num_lines = np.random.default_rng(seed), len(sizes)
    columns = np.stack([*amounts.values(), sizes]).astype(np.float64)
    sums = np.empty((len(columns), num_samples))
    step = max(1, _PICKED // num_lines)
    for start in range(0, num_samples, step):
        stop = min(start + step, num_samples)
        picked = draw.integers(num_lines, size=(stop - start, num_lines))
        for column, total in zip(columns, sums, strict=True):
            total[start:stop] = column[picked].sum(axis=1)
    values = columns[:-1].sum(axis=1) / columns[-1].sum()
    resampled = sums[:-1] / sums[-1]
    found = []
    for model, value, own in zip(list(amounts)[1:], values[1:], resampled[1:], strict=True):
        difference, differences = value - values[0], own - resampled[0]
        beyond = np.count_nonzero(np.abs(differences - differences.mean()) >= abs(difference))
        low, high = np.percentile(differences, [2.5, 97.5])
        p_value = (1 + beyond) / (1 + num_samples)
        found.append(Difference(model, float(value), float(difference), float(low), float(high), float(p_value)))
    return found
