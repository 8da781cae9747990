"""The mean of a few measurements and how sure it is. A pure function, free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

DIGITS = 8  # significant digits of a printed figure


def rounded(value: float) -> float:
    """The figure as it is printed: eight significant digits."""
    return float(f"{value:.{DIGITS}g}")


def mean_and_interval(values: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """Mean of several measurements and the 95% t-interval of that mean; no interval for one alone."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    from scipy.special import stdtrit

    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)
    return mean, (mean - half, mean + half)
