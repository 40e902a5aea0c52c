"""What the tables share: result files, figures, the machine they were measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
READ = "read pass"  # the unit of time in the benchmarks that count passes
MIB = 1 << 20
GIB = 1 << 30

Results = dict[str, Any]


def load(name: str) -> Results:
    """One benchmark's results."""
    results: Results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


def interval(value: float, bounds: list[float], digits: int) -> str:
    """A figure and its interval."""
    return f"{number(value, digits)} [{number(bounds[0], digits)}, {number(bounds[1], digits)}]"


def number(value: float, digits: int = 2) -> str:
    """A figure, with digits after the point while they say something."""
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def mean_and_error(value: Results, digits: int) -> str:
    """A mean, and its standard error if there is one."""
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f}" + ("" if error is None else f" +- {error:.{digits}f}")


def machine_line(results: Results) -> str:
    """Where and with what it was measured."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{results['date'][:10]}, {machine['processor']}, {machine['torch_threads']} threads, "
        f"{machine['memory_bytes'] / GIB:.0f} GiB, Python {machine['python']}, {versions}."
    )


def other_work(results: Results) -> str:
    """What to think of the seconds, if the machine was not left alone."""
    load, threads = results["machine"]["load_average"][0], results["machine"]["torch_threads"]
    if load <= threads + 1:
        return ""
    return f" Other work ran beside it (load average {load:.1f}, {threads} cores): seconds are upper bounds."


def yes(value: bool) -> str:
    """A word for a truth value."""
    return "yes" if value else "no"
