"""What may be asked of a detector or a probe."""

from __future__ import annotations

from fractions import Fraction
from numbers import Real

from lottery_tickets.errors import DetectionError


def checked_integer(number: int, what: str, *, least: int) -> int:
    """The number, if it is an integer of at least this.

    Raises:
        DetectionError: Anything else.
    """
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise DetectionError(f"{what} is an integer of at least {least}, got {number!r}.")
    return number


def checked_threshold(threshold: float) -> Fraction:
    """The decimal that the threshold is written as, if it lies in (0, 1).

    Raises:
        DetectionError: Anything else.
    """
    if not (_is_real(threshold) and 0 < threshold < 1):
        raise DetectionError(f"threshold lies above 0 and below 1, got {threshold!r}.")
    return Fraction(str(threshold))


def checked_between(number: float, what: str, least: float, most: float) -> float:
    """The number, if it lies between these.

    Raises:
        DetectionError: Anything else.
    """
    if not (_is_real(number) and least <= number <= most):
        raise DetectionError(f"{what} lies in [{least}, {most}], or is None if not known; got {number!r}.")
    return float(number)


def _is_real(number: object) -> bool:
    return isinstance(number, Real) and not isinstance(number, bool)
