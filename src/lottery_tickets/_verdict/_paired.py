"""Statistics of one number for each seed: intervals, one-sided tests, and how many seeds a test would need."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lottery_tickets._statistics import Interval

# The chance to see an effect of the size that was observed, for which `seeds_needed` gives the number of seeds.
POWER = 0.8
# More seeds than this are not counted.
MANY = 1000


def mean_of(values: Sequence[float]) -> float:
    """The sum, rounded once, over the number."""
    return math.fsum(values) / len(values)


def t_interval(values: Sequence[float], confidence: float) -> Interval:
    r"""Student's two-sided interval of the mean behind independent draws.

    $$\bar x \pm t_{n-1,\,(1+c)/2}\,s/\sqrt n$$

    Args:
        values: Two or more.
        confidence: In (0, 1).

    References:
        Student, "The probable error of a mean", Biometrika 6, 1908.
    """
    from scipy.special import stdtrit

    mean = mean_of(values)
    half = float(stdtrit(len(values) - 1, (1 + confidence) / 2)) * _error(values)
    return mean - half, mean + half


def p_above(values: Sequence[float], null: float) -> float:
    r"""One-sided p-value against the hypothesis that the mean behind the values is at most `null`.

    Student's, of $(\bar x - \mu_0)\sqrt n/s$ with n - 1 degrees of freedom. Values that are all the same have no
    spread to go by: they give the sign test's $2^{-n}$ if they lie above `null`, else 1.

    Args:
        values: Two or more; of a paired comparison, the differences.
        null: The mean to be refuted.
    """
    from scipy.special import stdtr

    excess, error = mean_of(values) - null, _error(values)
    if error:
        return float(stdtr(len(values) - 1, -excess / error))
    return 0.5 ** len(values) if excess > _grain([*values, null]) else 1.0


def lower_bound(values: Sequence[float], confidence: float) -> float | None:
    """The largest mean that `p_above` refutes everything below of; None where it could refute nothing."""
    from scipy.special import stdtrit

    error = _error(values)
    if not error and 0.5 ** len(values) > 1 - confidence:
        return None
    return mean_of(values) - float(stdtrit(len(values) - 1, confidence)) * error


def seeds_needed(values: Sequence[float], null: float, confidence: float) -> int | None:
    """Fewest seeds with which `p_above` would probably refute `null`, were mean and spread those observed.

    An estimate, and a rough one: it takes the observed mean and standard deviation for the true ones. The
    probability is `POWER`, by the noncentral t distribution.

    Args:
        values: Two or more.
        null: The mean to be refuted.
        confidence: Of the test.

    Returns:
        The number, `MANY` + 1 for any beyond `MANY`; None if the observed mean is not above `null`, so that more
        seeds like these would refute nothing.

    References:
        Cohen, "Statistical Power Analysis for the Behavioral Sciences", 2nd edition, 1988, section 2.4. Hoenig and
        Heisey, "The abuse of power", The American Statistician 55, 2001: why observed effects make poor estimates.
    """
    excess = mean_of(values) - null
    if excess <= _grain([*values, null]):
        return None
    deviation = _error(values) * math.sqrt(len(values))
    if not deviation:
        return max(2, math.ceil(math.log(1 - confidence) / math.log(0.5)))
    few, enough = 1, 2
    while _power(enough, excess / deviation, confidence) < POWER:
        few, enough = enough, 2 * enough
        if few > MANY:
            return MANY + 1
    while enough - few > 1:
        middle = (few + enough) // 2
        if _power(middle, excess / deviation, confidence) < POWER:
            few = middle
        else:
            enough = middle
    return min(enough, MANY + 1)


def _power(seeds: int, effect: float, confidence: float) -> float:
    """Probability that the one-sided t test refutes the null when the mean lies `effect` deviations above it."""
    from scipy.special import nctdtr, stdtrit

    bound = float(stdtrit(seeds - 1, confidence))
    return 1 - float(nctdtr(seeds - 1, effect * math.sqrt(seeds), bound))


def _error(values: Sequence[float]) -> float:
    """Standard error of the mean; 0 for values that differ by nothing but rounding."""
    mean, n = mean_of(values), len(values)
    if max(values) - min(values) <= _grain(values):
        return 0.0
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def _grain(values: Sequence[float]) -> float:
    """What differences of numbers up to about 1, or of this size, owe to rounding."""
    return 1e-12 * max(1.0, *map(abs, values))
