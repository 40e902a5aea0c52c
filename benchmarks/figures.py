"""Draw docs/figures/ from benchmarks/results/.

    python benchmarks/figures.py

Each figure carries a digest of what it was drawn from, which the tests hold against the results.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results"
FOLDER = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#333333")  # Okabe and Ito's
MARKERS = "osD^"
TICKET = "winning ticket"
# Text stays text, and the same results make the same file.
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lottery-tickets", "font.size": 9}

Point = tuple[float, list[float]]


def lenet(results: Mapping[str, Any]) -> Figure:
    """Accuracy at early stopping, and when that is, against density."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    networks = [one for unit in results["seeds"] for one in unit["networks"]]
    kinds = list(dict.fromkeys(one["kind"] for one in networks))
    for turn, kind in enumerate(kinds):
        mine = [one for one in networks if one["kind"] == kind or not one["round"]]
        label = TICKET if kind == "ticket" else kind
        for panel, key, scale in zip(
            panels, ("early_stopping_test_accuracy", "early_stopping_step"), (100, 1), strict=True
        ):
            _line(panel, _by(mine, "density", lambda one, key=key, scale=scale: one[key] * scale), turn, label)
    for panel in panels:
        _density_axis(panel, [one["density"] for one in networks])
    panels[0].set_ylabel("test accuracy at early stopping, %")
    panels[1].set_ylabel("early-stopping iteration")
    panels[0].legend(frameon=False, fontsize="small", loc="lower left")
    return figure


def cnn(results: Mapping[str, Any]) -> Figure:
    """Instability against the rewinding step, and accuracy of tickets rewound to two of them."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for turn, (kind, label) in enumerate((("dense", "dense network"), ("ticket", "sparsest ticket"))):
        pairs = [one for unit in results["seeds"] for one in unit["instability"][kind]]
        _line(left, _by(pairs, "rewind_step", lambda one: one["error_barrier"] * 100), turn, label)
    left.axhline(2, color="black", linewidth=0.8, linestyle="--")
    left.set_ylim(bottom=0)
    left.set_xlabel("rewinding step k")
    left.set_ylabel("barrier of the test error, points of a hundred")
    left.legend(frameon=False, fontsize="small")
    networks = [one for unit in results["seeds"] for one in unit["networks"]]
    for turn, step in enumerate(dict.fromkeys(one["rewind_step"] for one in networks)):
        mine = [one for one in networks if one["rewind_step"] == step]
        label = f"rewound to step {step}"
        _line(right, _by(mine, "density", lambda one: one["test_accuracy"] * 100), turn + 2, label)
    _density_axis(right, [one["density"] for one in networks])
    right.set_ylabel("test accuracy at the end, %")
    right.legend(frameon=False, fontsize="small")
    for panel in (left, right):
        _plain(panel)
    return figure


def channels(results: Mapping[str, Any]) -> Figure:
    """Accuracy of whole trainings against their arithmetic."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    panel = figure.subplots()
    ways: dict[str, list[Mapping[str, Any]]] = {}
    for name, row in results["rows"].items():
        way, _, share = name.rpartition(" ")
        ways.setdefault(way or name, []).append({**row, "share": share})
    for turn, (way, rows) in enumerate(ways.items()):
        places = [row["operations_ratio"] for row in rows]
        means = [100 * row["accuracy"] for row in rows]
        low, high = zip(*(row["accuracy_interval"] for row in rows), strict=True)
        panel.errorbar(
            places,
            means,
            yerr=[
                [mean - 100 * one for mean, one in zip(means, low, strict=True)],
                [100 * one - mean for mean, one in zip(means, high, strict=True)],
            ],
            color=COLOURS[turn % len(COLOURS)],
            marker=MARKERS[turn % len(MARKERS)],
            markersize=4,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=1.5,
            label=way,
        )
        for place, mean, row in zip(places, means, rows, strict=True):
            if row["share"].startswith("0."):
                panel.annotate(row["share"], (place, mean), (4, 4), textcoords="offset points", fontsize="x-small")
    panel.set_xlabel("multiplications of the whole training, times dense training's")
    panel.set_ylabel("test accuracy, %")
    panel.legend(frameon=False, fontsize="small", loc="lower right")
    _plain(panel)
    return figure


FIGURES: dict[str, Callable[[Mapping[str, Any]], Figure]] = {"lenet": lenet, "cnn": cnn}


# Of a whole results file each.
WHOLE: dict[str, Callable[[Mapping[str, Any]], Figure]] = {"early_bird_channels": channels}


def digest(results: Mapping[str, Any]) -> str:
    """Of what a figure is drawn from."""
    return hashlib.sha256(json.dumps(results, sort_keys=True).encode()).hexdigest()


def _by(ones: Iterable[Mapping[str, Any]], key: str, value: Callable[[Mapping[str, Any]], float]) -> list[Point]:
    """Values of all seeds at each place, the places in order."""
    found: dict[float, list[float]] = {}
    for one in ones:
        found.setdefault(one[key], []).append(value(one))
    return sorted(found.items())


def _line(panel: Any, points: Sequence[Point], turn: int, label: str) -> None:
    """Means over seeds; the bars reach from the least to the greatest."""
    means = [statistics.fmean(values) for _, values in points]
    panel.errorbar(
        [place for place, _ in points],
        means,
        yerr=[
            [mean - min(values) for mean, (_, values) in zip(means, points, strict=True)],
            [max(values) - mean for mean, (_, values) in zip(means, points, strict=True)],
        ],
        color=COLOURS[turn % len(COLOURS)],
        marker=MARKERS[turn % len(MARKERS)],
        markersize=4,
        linewidth=1.2,
        elinewidth=0.8,
        capsize=1.5,
        label=label,
    )


def _density_axis(panel: Any, densities: Sequence[float]) -> None:
    """From dense to sparse, as the papers have it."""
    panel.set_xscale("log")
    panel.invert_xaxis()
    places = [one for one in (1, 0.5, 0.25, 0.12, 0.06, 0.03, 0.02) if one >= 0.95 * min(densities)]
    panel.set_xticks(places, [f"{one * 100:g}" for one in places])
    panel.minorticks_off()
    panel.set_xlabel("weights left, %")
    _plain(panel)


def _plain(panel: Any) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", alpha=0.25, linewidth=0.6)


def told_of(name: str) -> Any:
    """A results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def save(path: Path, results: Mapping[str, Any], draw: Callable[[Mapping[str, Any]], Figure]) -> None:
    """Draw a figure, with the digest of what it was drawn from."""
    with mpl.rc_context(STYLE):
        about = {"Date": None, "Description": f"sha256 {digest(results)}"}
        draw(results).savefig(path, format="svg", metadata=about)
    print(path)


def main() -> None:
    """Draw what there are results of."""
    told = told_of("reproduce")
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        if name in told:
            save(FOLDER / f"reproduction-{name}.svg", told[name], draw)
    for name, draw in WHOLE.items():
        save(FOLDER / f"{name.replace('_', '-')}.svg", told_of(name), draw)


if __name__ == "__main__":
    main()
