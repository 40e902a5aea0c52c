"""Numbers that arguments must be."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from lottery_tickets.errors import TrainingError


def check_count(name: str, value: Any) -> None:
    """Refuse what is neither None nor a positive integer."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise TrainingError(f"{name} is a positive integer, got {value!r}.")


def check_number(name: str, value: Any, *, least: float, most: float = math.inf) -> None:
    """Refuse what is not a finite number between two, themselves included."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not least <= value <= most:
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise TrainingError(f"{name} is a finite number {bounds}, got {value!r}.")


def check_seed(seed: Any) -> None:
    """Refuse what is not a non-negative integer."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise TrainingError(f"seed is a non-negative integer, got {seed!r}.")
