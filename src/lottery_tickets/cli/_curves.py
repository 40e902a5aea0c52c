"""What became of a run, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lottery_tickets._atomic import replacing
from lottery_tickets.cli._plot import COLOURS, figure_class
from lottery_tickets.cli._rounds import scores_of, seeds_in_words


def draw_rounds(path: Path, report: Mapping[str, Any]) -> None:
    """Accuracy (or loss) and early-stopping step over density, with intervals over seeds.

    Args:
        path: Its suffix names the format.
        report: What `imp` reports.

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, figures 1 and 4: the same two curves.
    """
    early, end, name = scores_of(report)
    figure = figure_class()(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    _line(left, report["rounds"], early, COLOURS[0], "stopped early")
    _line(left, report["rounds"], end, COLOURS[1], "at the end")
    left.legend(frameon=False, fontsize="small")
    left.set_ylabel(name)
    _line(right, report["rounds"], "early_stopping_step", COLOURS[0], "")
    right.set_ylabel("early-stopping step")
    for panel in (left, right):
        _density_axis(panel, [one["density"] for one in report["rounds"]])
    seeds = len(report["seeds"])
    over = f", {report['confidence']:.0%} intervals over {seeds} seeds" if seeds > 1 else ""
    figure.suptitle(f"{report['network']} on {report['data']}{over}", fontsize="medium")
    _write_figure(figure, path)


def draw_barriers(path: Path, report: Mapping[str, Any]) -> None:
    """Barrier between copies over the step at which they parted, with intervals over seeds.

    Args:
        path: Its suffix names the format.
        report: What `stability` reports.

    References:
        Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, figure 3.
    """
    metric, points = report["metric"], report["curve"]
    figure = figure_class()(figsize=(5.6, 3.8), layout="constrained")
    panel = figure.subplots()
    found = [{"mean": one[f"{metric}_barrier"], "interval": one[f"{metric}_interval"]} for one in points]
    _errorbar(panel, [one["rewind_step"] for one in points], found, COLOURS[0], "")
    panel.axhline(report["threshold"], color="black", linewidth=1, linestyle="--")
    _step_axis(panel, [one["rewind_step"] for one in points])
    panel.set_xlabel("step at which the copies part")
    panel.set_ylabel(f"{metric} barrier")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25, linewidth=0.6)
    title = f"{report['network']} on {report['data']}, {report['subject']}, {seeds_in_words(report['seeds'])}"
    panel.set_title(title, fontsize="medium")
    _write_figure(figure, path)


def _step_axis(panel: Any, steps: Sequence[int]) -> None:
    """Logarithmic, with room for step 0 before the first of the others."""
    from matplotlib.ticker import NullLocator

    least = min((step for step in steps if step), default=1)
    panel.set_xscale("symlog", linthresh=least, linscale=0.5)
    panel.set_xlim(-least / 4 if 0 in steps else least / 1.3, max(*steps, least) * 1.3)
    panel.set_xticks(steps, [f"{step:,}" for step in steps], fontsize="small")
    panel.xaxis.set_minor_locator(NullLocator())


def _density_axis(panel: Any, densities: Sequence[float]) -> None:
    """Logarithmic, the dense network on the left, ticks at the densities themselves."""
    from matplotlib.ticker import NullLocator

    panel.set_xscale("log")
    panel.invert_xaxis()
    step = -(-len(densities) // 8)
    panel.set_xticks(densities[::step], [f"{100 * density:.3g}" for density in densities[::step]])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xlabel("weights left (%)")
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25, linewidth=0.6)


def _write_figure(figure: Any, path: Path) -> None:
    """Whole or not at all."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".").lower(), dpi=150)


def _line(panel: Any, rounds: Sequence[Mapping[str, Any]], name: str, colour: str, label: str) -> None:
    there = [one for one in rounds if name in one["numbers"]]
    _errorbar(panel, [one["density"] for one in there], [one["numbers"][name] for one in there], colour, label)


def _errorbar(
    panel: Any, places: Sequence[float], found: Sequence[Mapping[str, Any]], colour: str, label: str
) -> None:
    """Means, and their intervals where all have one."""
    errors = None
    if all(one["interval"] for one in found):
        errors = [
            [one["mean"] - one["interval"][0] for one in found],
            [one["interval"][1] - one["mean"] for one in found],
        ]
    panel.errorbar(
        places,
        [one["mean"] for one in found],
        yerr=errors,
        color=colour,
        marker="o",
        markersize=3.5,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=2,
        label=label,
    )
