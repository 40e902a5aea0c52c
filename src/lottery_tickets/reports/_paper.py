"""The same figures for papers, drawn by matplotlib."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lottery_tickets._atomic import replacing
from lottery_tickets.errors import MissingExtraError, ReportError
from lottery_tickets.reports._content import Axis, Bars, Curves, Figure, Intervals, Line, Matrix

COLOURS = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#d55e00",
    "#cc79a7",
    "#56b4e9",
    "#8a7700",
    "#333333",
)  # Okabe and Ito's
MARKERS = "osD^v<>Pp*hX"
_WIDTH = 5.6  # inches, of a column and a half
_MOST_NAMES = 60
_DPI = 200
# Text stays text, and the same figure makes the same file.
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "lottery-tickets", "font.size": 9}


def figure_class() -> Any:
    """Matplotlib's `Figure`, which needs no display.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot") from error
    return Drawing


def check_format(path: Path, option: str) -> None:
    """Refuse, before anything is measured, what cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ReportError: A suffix that matplotlib does not know.
    """
    formats = sorted(figure_class()().canvas.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise ReportError(f"{option} {path}: the suffix names the format, one of {', '.join(formats)}.")


def draw(figures: Sequence[Figure], path: Path, title: str = "") -> None:
    """Figures beside each other in one file, whole or not at all.

    Args:
        figures: From left to right.
        path: Its suffix names the format.
        title: Above all; none if empty.
    """
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        sizes = [_size(figure) for figure in figures]
        size = (sum(width for width, _ in sizes), max(height for _, height in sizes))
        drawing = figure_class()(figsize=size, layout="constrained")
        panels = drawing.subplots(1, len(figures), squeeze=False)[0]
        for panel, figure in zip(panels, figures, strict=True):
            _on(figure, panel)
        if title:
            drawing.suptitle(title, fontsize="medium")
        kind = path.suffix.removeprefix(".").lower()
        about = {"Date": None} if kind == "svg" else None
        with replacing(path) as temporary:
            drawing.savefig(temporary, format=kind, dpi=_DPI, metadata=about)


def _size(figure: Figure) -> tuple[float, float]:
    """In inches."""
    if isinstance(figure, Bars):
        return _WIDTH, max(2.0, 0.9 + 0.2 * len(figure.names)) if len(figure.names) <= _MOST_NAMES else 2.8
    if isinstance(figure, Intervals):
        return _WIDTH, 1.0 + 0.32 * len(figure.names)
    return (_WIDTH, 4.8) if isinstance(figure, Matrix) else (_WIDTH, 3.6)


@functools.singledispatch
def _on(figure: Figure, panel: Any) -> None:
    raise NotImplementedError(type(figure).__name__)


@_on.register
def _(figure: Curves, panel: Any) -> None:
    for turn, line in enumerate(figure.lines):
        panel.errorbar(
            [point.x for point in line.points],
            [point.y for point in line.points],
            yerr=_errors(line),
            color=COLOURS[turn % len(COLOURS)],
            marker=MARKERS[turn % len(MARKERS)],
            markersize=3.5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
            label=line.name,
        )
    for level in figure.levels:
        panel.axhline(level.y, color="black", linewidth=1, linestyle="--", label=level.name)
    _prepare(panel, figure.x, [point.x for line in figure.lines for point in line.points])
    if figure.y.scale == "log":
        panel.set_yscale("log")
    if figure.y.from_zero:
        panel.set_ylim(bottom=0)
    _name(panel, figure.x, figure.y)
    if len(figure.lines) > 1 or figure.levels:
        panel.legend(frameon=False, fontsize="small")


@_on.register
def _(figure: Bars, panel: Any) -> None:
    if len(figure.names) <= _MOST_NAMES:
        places = range(len(figure.names))
        panel.barh(places, figure.values, color=COLOURS[0], height=0.65)
        panel.set_yticks(places, [_literal(name) for name in figure.names], fontsize="small")
        panel.invert_yaxis()
        panel.xaxis.set_major_formatter(_formatter(figure.axis))
        panel.set_xlabel(figure.axis.title)
        if figure.axis.ticks is not None:
            panel.set_xticks(figure.axis.ticks)
        _quiet(panel, "x")
        if figure.limit is not None:
            panel.axvline(figure.limit.y, color="black", linewidth=1, linestyle="--")
    else:
        panel.bar(range(len(figure.names)), figure.values, color=COLOURS[0], width=1.0)
        panel.set_xlabel(f"{figure.what}, in the model's order")
        panel.set_ylabel(figure.axis.title)
        panel.yaxis.set_major_formatter(_formatter(figure.axis))
        _quiet(panel, "y")
        if figure.limit is not None:
            panel.axhline(figure.limit.y, color="black", linewidth=1, linestyle="--")


@_on.register
def _(figure: Intervals, panel: Any) -> None:
    for place, (name, point) in enumerate(zip(figure.names, figure.points, strict=True)):
        errors = None
        if point.low is not None and point.high is not None:
            errors = [[point.y - point.low], [point.high - point.y]]
        panel.errorbar(
            [point.y],
            [place],
            xerr=errors,
            color=COLOURS[3 if name == figure.first else 0],
            marker="o",
            markersize=5,
            capsize=2,
        )
    panel.set_yticks(range(len(figure.names)), [_literal(name) for name in figure.names])
    panel.set_ylim(len(figure.names) - 0.5, -0.5)
    if figure.axis.scale == "log":
        panel.set_xscale("log")
    panel.set_xlabel(figure.axis.title)
    panel.xaxis.set_major_formatter(_formatter(figure.axis))
    _quiet(panel, "x")


@_on.register
def _(figure: Matrix, panel: Any) -> None:
    values = np.array([[np.nan if one is None else one for one in row] for row in figure.values])
    image = panel.imshow(values, cmap="Blues", vmin=0.0)
    step = max(1, -(-len(figure.names) // 12))
    places = range(0, len(figure.names), step)
    labels = [_literal(figure.names[place]) for place in places]
    slanted = max(map(len, figure.names)) > 4
    panel.set_xticks(
        places, labels, fontsize="small", rotation=40 if slanted else 0, ha="right" if slanted else "center"
    )
    panel.set_yticks(places, labels, fontsize="small")
    panel.set_xlabel(figure.what)
    panel.set_ylabel(figure.what)
    panel.figure.colorbar(image, ax=panel, label=figure.axis.title, format=_formatter(figure.axis))


def _prepare(panel: Any, axis: Axis, places: Sequence[float]) -> None:
    """The scale, with ticks where there are points."""
    from matplotlib.ticker import NullLocator

    if axis.scale == "linear":
        return
    if axis.scale == "log":
        panel.set_xscale("log")
    else:
        least = min((place for place in places if place > 0), default=1)
        panel.set_xscale("symlog", linthresh=least, linscale=0.5)
        panel.set_xlim(-least / 4 if 0 in places else least / 1.3, max(*places, least) * 1.3)
    if axis.falling:
        panel.invert_xaxis()
    ticks = sorted(set(places))
    panel.set_xticks(ticks[:: -(-len(ticks) // 8)])
    panel.xaxis.set_minor_locator(NullLocator())


def _name(panel: Any, x: Axis, y: Axis) -> None:
    panel.set_xlabel(x.title)
    panel.set_ylabel(y.title)
    panel.xaxis.set_major_formatter(_formatter(x))
    panel.yaxis.set_major_formatter(_formatter(y))
    _quiet(panel, "y")


def _quiet(panel: Any, axis: str) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis=axis, alpha=0.25, linewidth=0.6)


def _formatter(axis: Axis) -> Any:
    from matplotlib.ticker import FuncFormatter

    if axis.percent:
        return FuncFormatter(lambda value, _: f"{100 * value:.3g}%")
    return FuncFormatter(lambda value, _: axis.spelling(value))


def _literal(name: str) -> str:
    """No mathematics: what stands between dollars is a name too."""
    return name.replace("$", r"\$")


def _errors(line: Line) -> list[list[float]] | None:
    """How far the intervals reach below and above the points, where all have one."""
    if any(point.low is None or point.high is None for point in line.points):
        return None
    return [
        [point.y - (point.low or 0.0) for point in line.points],
        [(point.high or 0.0) - point.y for point in line.points],
    ]
