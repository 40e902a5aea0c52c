"""A comparison as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lottery_tickets._atomic import replacing
from lottery_tickets.errors import EvaluationError, MissingExtraError

_SHIFT = 0.001  # of points that would lie on each other, sideways
_MARKERS = "osD^v<>Pp*hX"


def check_plot(path: Path) -> None:
    """Refuse, before anything is measured, what cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        EvaluationError: A suffix that matplotlib does not know.
    """
    figure = figure_class()()
    formats = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise EvaluationError(f"--plot {path}: the suffix names the format, one of {', '.join(formats)}.")


def write_plot(path: Path, data: Mapping[str, Any]) -> None:
    """Perplexity over sparsity, a line for each criterion and spread, with intervals.

    Args:
        path: Its suffix names the format.
        data: What `compare` reports.
    """
    figure = figure_class()(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense = data["dense"]
    axes.axhline(dense["perplexity"], color="black", linewidth=1, linestyle=":", label="dense")
    if dense["perplexity_interval"] is not None:
        axes.axhspan(*dense["perplexity_interval"], color="black", alpha=0.08, linewidth=0)
    criteria = list(dict.fromkeys(row["criterion"] for row in data["rows"]))
    spreads = list(dict.fromkeys(row["spread"] for row in data["rows"]))
    series = [(criterion, spread) for criterion in criteria for spread in spreads]
    for place, (criterion, spread) in enumerate(series):
        rows = [row for row in data["rows"] if (row["criterion"], row["spread"]) == (criterion, spread)]
        if rows:
            axes.errorbar(
                [row["quality"]["sparsity"] + _SHIFT * (place - len(series) / 2) for row in rows],
                [row["quality"]["perplexity"] for row in rows],
                yerr=_errors(rows),
                color=f"C{criteria.index(criterion) % 10}",
                marker=_MARKERS[spreads.index(spread) % len(_MARKERS)],
                linestyle="-" if spreads.index(spread) == 0 else "--",
                markersize=5,
                linewidth=1,
                capsize=2,
                label=f"{criterion}, {spread}",
            )
    axes.set_yscale("log")
    axes.set_xlabel("sparsity (share of the prunable weights removed)")
    axes.set_ylabel(f"perplexity, with {data['confidence']:.0%} intervals over windows")
    axes.set_title(f"{data['model']} on {Path(data['text']).name}")
    axes.grid(visible=True, which="both", alpha=0.2)
    figure.legend(loc="outside right upper", fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower(), dpi=150)


def _errors(rows: list[Mapping[str, Any]]) -> list[list[float]] | None:
    """How far the intervals reach below and above the points."""
    qualities = [row["quality"] for row in rows]
    if any(quality["perplexity_interval"] is None for quality in qualities):
        return None
    return [
        [quality["perplexity"] - quality["perplexity_interval"][0] for quality in qualities],
        [quality["perplexity_interval"][1] - quality["perplexity"] for quality in qualities],
    ]


def figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error
    return Figure
