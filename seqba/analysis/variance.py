"""The two parts of a batch gradient's variance: between samples, and within a sample, over T.

With mu_n = E[grad loss(w, T(x_n), y_n)] over T, and ||.|| over all weights,
    s_b^2 = E ||mu_n - E mu_n||^2                       between samples
    s_w^2 = E ||grad loss(w, T(x_n), y_n) - mu_n||^2    within a sample, the noise of T
the mean over B samples, each under M independent draws of T, has the variance (the trace of its covariance)
    Var = s_b^2 / B + s_w^2 / (M*B)
against (s_b^2 + s_w^2) / (M*B) for M*B distinct samples: copies remove noise of T alone. This is the reduction of
variance that Hoffer et al. 2020, sections 2.1 and 3, speak of; the split is that of a random one-way layout
(Searle, Casella and McCulloch 1992, "Variance Components", chapter 3). Samples are taken to be drawn independently.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqba.analysis.student import student_quantile

Interval = tuple[float, float]
_LEAST_FOR_INTERVAL = 4


@dataclass(frozen=True)
class NoiseSplit:
    """The noise within samples and between them, as squared L2 norms of gradients of a mean loss.

    Estimates are unbiased, so that one of a noise near 0 may be negative.

    Attributes:
        within: s_w^2, the variance of one copy's gradient around its sample's mean over T.
        between: s_b^2, the variance of the samples' means.
        within_interval, between_interval: of `split_variance`; without end where too few groups were measured.
    """

    within: float
    between: float
    within_interval: Interval = (-math.inf, math.inf)
    between_interval: Interval = (-math.inf, math.inf)

    def variance(self, num_samples: int, num_copies: int = 1) -> float:
        """Of the mean gradient over B samples of M copies each.

        >>> NoiseSplit(within=8.0, between=2.0).variance(4, num_copies=2)
        1.5
        """
        return self.between / num_samples + self.variance_of_copies(num_samples, num_copies)

    def variance_of_copies(self, num_samples: int, num_copies: int = 1) -> float:
        """The part of it that more copies would still lower.

        >>> NoiseSplit(within=8.0, between=2.0).variance_of_copies(4, num_copies=2)
        1.0
        """
        return self.within / (num_copies * num_samples)


def split_variance(gradients: Tensor, group_size: int = 1, *, confidence: float = 0.95) -> NoiseSplit:
    """Split the variance of gradients of G groups of samples, each under M independent draws of T.

    The spread over the draws of one group gives s_w^2/b. The spread of the groups' means gives s_b^2/b + s_w^2/(M*b):
    the copies of one group say nothing about the noise between samples. The intervals are Student's, over the groups;
    of s_b^2 by the delete-one jackknife.

    Args:
        gradients: (G, M, D): of group g under draw m the mean gradient over its samples. Groups are halves of a batch,
            or other batches: of one update, or of other ranks.
        group_size: b, samples in a group.
        confidence: of the intervals, in (0, 1). They are without end for less than 4 groups.

    Raises:
        ValueError: less than 2 groups or draws, or an argument out of range.

    >>> gradients = torch.tensor([[[1.0], [3.0]], [[6.0], [8.0]]])
    >>> split = split_variance(gradients)
    >>> split.within, split.between
    (2.0, 11.5)
    """
    if gradients.ndim != 3 or gradients.shape[0] < 2 or gradients.shape[1] < 2:
        raise ValueError(
            "gradients must be (G, M, D) of at least 2 groups of samples and 2 draws of T, got shape "
            f"{tuple(gradients.shape)}"
        )
    if group_size < 1:
        raise ValueError(f"group_size must be at least 1, got {group_size}")
    check_confidence(confidence)
    gradients = gradients.double()
    num_groups, num_copies = gradients.shape[:2]
    within = group_size * gradients.var(1).sum(-1)  # (G,), each unbiased for s_w^2
    means = gradients.mean(1)
    distances = torch.cdist(means, means, compute_mode="donot_use_mm_for_euclid_dist").square()  # (G, G)

    def between(distances: Tensor, within: Tensor) -> Tensor:
        """s_b^2 of some groups: E of half a squared distance is s_b^2/b + s_w^2/(M*b)."""
        pairs = len(within) * (len(within) - 1)
        return group_size * distances.sum() / (2 * pairs) - within.mean() / num_copies

    others = [torch.arange(num_groups) != g for g in range(num_groups)] if num_groups > 2 else []
    return NoiseSplit(
        within=float(within.mean()),
        between=float(between(distances, within)),
        within_interval=mean_interval(within.tolist(), confidence),
        between_interval=_jackknife(
            float(between(distances, within)),
            [float(between(distances[kept][:, kept], within[kept])) for kept in others],
            confidence,
        ),
    )


def check_confidence(confidence: float) -> None:
    """Refuse a confidence outside of (0, 1) by a ValueError."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Student's interval of the mean of independent values; without end for less than 4 of them.

    >>> mean_interval([1.0, 2.0])
    (-inf, inf)
    """
    if len(values) < _LEAST_FOR_INTERVAL:
        return -math.inf, math.inf
    mean = math.fsum(values) / len(values)
    error = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) * (len(values) - 1)))
    reach = student_quantile((1 + confidence) / 2, len(values) - 1) * error
    return mean - reach, mean + reach


def _jackknife(estimate: float, without_one: Sequence[float], confidence: float) -> Interval:
    """From pseudo-values: G * estimate - (G - 1) * the estimate without group g (Tukey 1958)."""
    count = len(without_one)
    if count < _LEAST_FOR_INTERVAL:
        return -math.inf, math.inf
    return mean_interval([count * estimate - (count - 1) * one for one in without_one], confidence)
