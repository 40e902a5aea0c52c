"""How numbers are spelled in reports."""

from __future__ import annotations

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def plain(value: float) -> str:
    """Four digits that say something, with commas between thousands."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) >= 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(value: float) -> str:
    """A share of one, in hundredths."""
    hundredths = 100 * value
    digits = 1 if abs(hundredths) >= 10 else 2
    text = f"{hundredths:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.')}%"


def precise_percent(value: float) -> str:
    """The same where small differences count."""
    return f"{100 * value:.2f}%"


def memory(value: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    place = 0
    while abs(value) >= 1024 and place < len(_UNITS) - 1:
        value /= 1024
        place += 1
    return f"{value:,.0f} {_UNITS[place]}" if place == 0 or value >= 100 else f"{value:,.1f} {_UNITS[place]}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
