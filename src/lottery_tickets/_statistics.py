"""Ratios of sums over batches, and how far they would vary over other batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

Interval = tuple[float, float]


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float
) -> Interval | None:
    """Confidence interval of sum(numerators) / sum(denominators), the pairs being independent draws.

    With R the ratio of the sums over n pairs (x_i, y_i), the standard error is
    `sqrt(n / (n - 1) * sum((x_i - R y_i)^2)) / sum(y)`, and the interval is R plus and minus Student's t quantile
    of n - 1 degrees of freedom times that: wide where pairs are few. None for fewer than two pairs.

    References:
        Cochran, "Sampling Techniques", 3rd edition, 1977, section 6.4 (variance of the ratio estimate).
    """
    from scipy.special import stdtrit

    n, whole = len(numerators), math.fsum(denominators)
    if n < 2 or not whole:
        return None
    ratio = math.fsum(numerators) / whole
    squares = math.fsum((x - ratio * y) ** 2 for x, y in zip(numerators, denominators, strict=True))
    error = math.sqrt(n / (n - 1) * squares) / abs(whole)
    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return ratio - half, ratio + half


def share_interval(count: int, total: int, confidence: float) -> Interval:
    """Wilson's confidence interval of the probability behind `count` hits in `total` independent trials.

    References:
        Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.
    """
    from scipy.stats import binomtest

    interval = binomtest(count, total).proportion_ci(confidence, "wilson")
    return float(interval.low), float(interval.high)
