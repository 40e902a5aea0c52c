"""Amounts of memory in words and numbers."""

from __future__ import annotations

import re

from lottery_tickets.errors import PlanError

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}B": 1000**_power, f"{_letter}IB": 1024**_power}

_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def amount_of(text: int | str) -> int:
    """Bytes, from a number or from text such as "80GB" (10^9) or "24 GiB" (2^30).

    Raises:
        PlanError: Text that is no amount, or nothing.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        number, unit = float(text), ""
    else:
        match = _AMOUNT.fullmatch(str(text))
        number, unit = (float(match[1]), match[2].upper()) if match else (0.0, "?")
    if unit not in _UNITS or number <= 0:
        raise PlanError(
            f"An amount of memory is a positive number of bytes, or such as '80GB', '24GiB'; got {text!r}."
        )
    return int(number * _UNITS[unit])


def shown(count: int) -> str:
    """Bytes for a reader, in units of 1000."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(size) < 999.5:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.3g} {unit}"
