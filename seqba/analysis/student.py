"""Student's distribution of t."""

import math
from functools import cache

import numpy as np

_quadrature = cache(np.polynomial.legendre.leggauss)
_NODES = 400


def student_tail(t: float, freedom: float) -> float:
    """The probability of a |t| at least this large.

    The integral of cos^(freedom - 1) from atan(t / sqrt(freedom)) to pi / 2, over that from 0.

    >>> round(student_tail(2.228, 10), 3)
    0.05
    """
    nodes, weights = _quadrature(_NODES)

    def integral(low: float) -> float:
        angles = low + (math.pi / 2 - low) * (nodes + 1) / 2
        return float(weights @ np.cos(angles) ** (freedom - 1)) * (math.pi / 2 - low) / 2

    return min(1.0, integral(math.atan(abs(t) / math.sqrt(freedom))) / integral(0.0))


@cache
def student_quantile(probability: float, freedom: float) -> float:
    """The t that is not exceeded with this probability, above 1/2: by bisection of its angle.

    >>> round(student_quantile(0.975, 10), 2)
    2.23
    """
    low, high = 0.0, math.pi / 2
    for _ in range(50):
        angle = (low + high) / 2
        above = student_tail(math.sqrt(freedom) * math.tan(angle), freedom) / 2
        low, high = (angle, high) if above > 1 - probability else (low, angle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
