"""A comparison as a plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lottery_tickets._atomic import replacing
from lottery_tickets.reports import COLOURS, MARKERS, figure_class

_COLUMNS = 4
_BESIDE = 0.35  # of the distance between two sparsities: points of several criteria stand beside each other


def write_plot(path: Path, data: Mapping[str, Any]) -> None:
    """Perplexity over sparsity: a panel for each spread, a line for each criterion, with intervals.

    Args:
        path: Its suffix names the format.
        data: What `compare` reports.
    """
    spreads = list(dict.fromkeys(row["spread"] for row in data["rows"]))
    criteria = list(dict.fromkeys(row["criterion"] for row in data["rows"]))
    columns = min(len(spreads), _COLUMNS)
    lines = -(-len(spreads) // columns)
    figure = figure_class()(figsize=(2 + 2.4 * columns, 1 + 3.4 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for panel, spread in zip(panels, spreads, strict=False):
        _draw_panel(panel, [row for row in data["rows"] if row["spread"] == spread], criteria, data["dense"])
        panel.set_title(spread, fontsize="medium")
    for panel in panels[len(spreads) :]:
        panel.remove()
    _number_axis(panels[0], data)
    figure.supxlabel("sparsity: share of the prunable weights removed", fontsize="medium")
    figure.supylabel(f"perplexity, {data['confidence']:.0%} intervals over windows", fontsize="medium")
    figure.suptitle(f"{data['model']} on {Path(data['text']).name}", fontsize="large")
    handles = {
        label: handle
        for panel in panels[: len(spreads)]
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    order = [label for label in ("dense", *criteria) if label in handles]
    figure.legend(
        [handles[label] for label in order], order, loc="outside right center", frameon=False, fontsize="small"
    )
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower(), dpi=200)


def _draw_panel(
    panel: Any, rows: Sequence[Mapping[str, Any]], criteria: Sequence[str], dense: Mapping[str, Any]
) -> None:
    """One spread."""
    panel.axhline(dense["perplexity"], color="black", linewidth=1, linestyle="--", label="dense")
    if dense["perplexity_interval"] is not None:
        panel.axhspan(*dense["perplexity_interval"], color="black", alpha=0.08, linewidth=0)
    # To a thousandth: rounding moves a total by a weight, and is no other sparsity.
    places = sorted({round(row["quality"]["sparsity"], 3) for row in rows})
    gap = min((high - low for low, high in itertools.pairwise(places)), default=0.2)
    here = [name for name in criteria if any(row["criterion"] == name for row in rows)]
    for place, name in enumerate(here):
        mine = sorted(
            (row for row in rows if row["criterion"] == name), key=lambda row: row["quality"]["sparsity"]
        )
        turn = criteria.index(name)
        panel.errorbar(
            [row["quality"]["sparsity"] + gap * _BESIDE * ((place + 0.5) / len(here) - 0.5) for row in mine],
            [row["quality"]["perplexity"] for row in mine],
            yerr=_errors(mine),
            color=COLOURS[turn % len(COLOURS)],
            marker=MARKERS[turn % len(MARKERS)],
            markersize=4.5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=1.5,
            label=name,
        )
    panel.set_xlim(places[0] - gap / 2, places[-1] + gap / 2)
    panel.set_xticks(places, [f"{place:g}" for place in places])
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25, linewidth=0.6)


def _number_axis(panel: Any, data: Mapping[str, Any]) -> None:
    """A logarithmic axis with whole numbers beside it, that all panels share."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = [data["dense"]["perplexity"], *(row["quality"]["perplexity"] for row in data["rows"])]
    narrow = max(found) < 100 * min(found)
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=20))
    panel.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value < 1e6 else f"{value:.0e}")
    )
    panel.yaxis.set_minor_formatter(NullFormatter())


def _errors(rows: list[Mapping[str, Any]]) -> list[list[float]] | None:
    """How far the intervals reach below and above the points."""
    qualities = [row["quality"] for row in rows]
    if any(quality["perplexity_interval"] is None for quality in qualities):
        return None
    return [
        [quality["perplexity"] - quality["perplexity_interval"][0] for quality in qualities],
        [quality["perplexity_interval"][1] - quality["perplexity"] for quality in qualities],
    ]
