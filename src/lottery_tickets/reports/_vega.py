"""Figures of the page: Vega-Lite drawn to SVG beforehand, so that the page itself runs no charting code."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from lottery_tickets.errors import MissingExtraError
from lottery_tickets.reports._content import Axis, Bars, Curves, Figure, Intervals, Matrix, Point

WIDE, NARROW = 760, 340  # pixels, of a desk and of a phone
_SERIES = tuple(f"var(--series-{number})" for number in range(1, 9))
_SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down")
_NAMED_BARS = 40  # beyond that many, names would be too small to read
_NUMBERED_CELLS = 12
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_LONGEST_NAME = {WIDE: 230, NARROW: 110}

_CONFIG: dict[str, Any] = {
    "font": _FONT,
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "titleFontSize": 12,
        "titlePadding": 10,
        "labelFontSize": 12,
        "labelPadding": 6,
        "gridColor": "var(--line)",
        "domain": False,
        "ticks": False,
    },
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": "var(--ink)",
        "labelFontSize": 12,
        "labelLimit": 260,
        "symbolSize": 60,
        "offset": 12,
        "columnPadding": 26,
        "symbolOpacity": 1,
        "symbolStrokeWidth": 0,
    },
}

Spec = dict[str, Any]

_MUTE = {"aria": False}  # a mark without a description of its own


def svg_of(figure: Figure, width: int) -> str:
    """The figure as Vega draws it; colours are variables that the page sets.

    Raises:
        MissingExtraError: vl-convert is not installed.
    """
    spec = {
        "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
        "config": _CONFIG,
        "autosize": {"type": "fit-x", "contains": "padding"},
        "width": width,
        "padding": 2,
        **_spec(figure, width),
    }
    return str(_converter().vegalite_to_svg(spec))


def check_charts() -> None:
    """Refuse, before anything is read, what could not be drawn.

    Raises:
        MissingExtraError: vl-convert is not installed.
    """
    _converter()


def _converter() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("vl-convert-python", "report") from error
    return vl_convert


@functools.singledispatch
def _spec(figure: Figure, width: int) -> Spec:
    raise NotImplementedError(type(figure).__name__)


# ---------------------------------------------------------------- lines


@_spec.register
def _(figure: Curves, width: int) -> Spec:
    names = [line.name for line in figure.lines]
    rows = [
        {"line": line.name, "tip": _tip(line.name, point, figure), **_coordinates(point)}
        for line in figure.lines
        for point in line.points
    ]
    colour = {
        "field": "line",
        "type": "nominal",
        "sort": names,
        "scale": {"domain": names, "range": [_SERIES[turn % len(_SERIES)] for turn in range(len(names))]},
        "legend": {"columns": 1 if width == NARROW else 4} if len(names) > 1 else None,
    }
    shape = {
        "field": "line",
        "type": "nominal",
        "sort": names,
        "scale": {"domain": names, "range": [_SHAPES[turn % len(_SHAPES)] for turn in range(len(names))]},
        "legend": colour["legend"],
    }
    x = {
        "field": "x",
        "type": "quantitative",
        "scale": _scale(figure.x, figure),
        "axis": {**_axis(figure.x, width), "grid": False},
    }
    y = {"field": "y", "type": "quantitative", "scale": _scale(figure.y, None), "axis": _axis(figure.y, width)}
    between = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
    with_interval = [{"filter": "isValid(datum.low)"}]
    banded = all(len(line.points) > 1 for line in figure.lines)
    layers: list[Spec] = [
        *(_level(level.y, level.name, y) for level in figure.levels),
        {
            "transform": with_interval,
            "mark": {"type": "area", "opacity": 0.14, **_MUTE}
            if banded
            else {"type": "rule", "opacity": 0.5, **_MUTE},
            "encoding": {"x": x, **between, "color": colour},
        },
        {"mark": {"type": "line", "strokeWidth": 1.8, **_MUTE}, "encoding": {"x": x, "y": y, "color": colour}},
        {
            "mark": {"type": "point", "filled": True, "size": 46, "opacity": 1},
            "encoding": {"x": x, "y": y, "color": colour, "shape": shape, "description": {"field": "tip"}},
        },
    ]
    return {"height": 300 if width == WIDE else 240, "data": {"values": rows}, "layer": layers}


def _coordinates(point: Point) -> dict[str, float | None]:
    return {"x": point.x, "y": point.y, "low": point.low, "high": point.high}


def _tip(name: str, point: Point, figure: Curves) -> str:
    between = _between(point, figure.y)
    return f"{name}, {figure.x.title} {figure.x.spelling(point.x)}: {figure.y.spelling(point.y)}{between}"


def _between(point: Point, axis: Axis) -> str:
    if point.low is None or point.high is None:
        return ""
    return f" [{axis.spelling(point.low)}, {axis.spelling(point.high)}]"


def _level(value: float, name: str, y: Spec) -> Spec:
    """A dashed line, and its name above its right end."""
    place = {"y": {**y, "field": "level"}}
    rule = {"mark": {"type": "rule", "strokeDash": [4, 4], "color": "var(--muted)", **_MUTE}, "encoding": place}
    label = {
        "mark": {
            **_MUTE,
            "type": "text",
            "align": "right",
            "dy": -7,
            "dx": -2,
            "color": "var(--muted)",
            "fontSize": 11,
        },
        "encoding": {**place, "x": {"value": "width"}, "text": {"field": "name"}},
    }
    return {"data": {"values": [{"level": value, "name": name}]}, "layer": [rule, label]}


def _scale(axis: Axis, figure: Curves | None) -> Spec:
    scale: Spec = {"type": axis.scale, "zero": axis.from_zero, "reverse": axis.falling, "nice": figure is None}
    if axis.scale == "log" and figure is not None:
        places = [point.x for line in figure.lines for point in line.points]
        low, high = min(places), max(places)
        margin = (high / low) ** 0.03 if high > low else 1.1
        scale["domain"] = [low / margin, high * margin]
    if axis.scale == "symlog" and figure is not None:
        places = [point.x for line in figure.lines for point in line.points]
        scale["constant"] = min((place for place in places if place > 0), default=1)
    return scale


# As `memory` spells numbers, but for digits that say nothing.
_MEMORY = (
    "datum.value == 0 ? '0' : datum.value >= 1073741824 ? format(datum.value / 1073741824, ',.3~r') + ' GiB' : "
    "datum.value >= 1048576 ? format(datum.value / 1048576, ',.3~r') + ' MiB' : "
    "format(datum.value / 1024, ',.3~r') + ' KiB'"
)


def _axis(axis: Axis, width: int) -> Spec:
    shown: Spec = {"title": axis.title, "labelOverlap": "greedy", "labelSeparation": 8}
    if axis.ticks is not None:
        shown["values"] = list(axis.ticks)
    if axis.percent:
        shown["labelExpr"] = "format(100 * datum.value, '.3~r') + '%'"
    elif axis.spelling.__name__ == "memory":
        shown["labelExpr"] = _MEMORY
    else:
        shown["labelExpr"] = "abs(datum.value) >= 1e6 ? format(datum.value, '.0e') : format(datum.value, ',.6~r')"
    shown["tickCount"] = 6 if width == WIDE else 4
    return shown


# ---------------------------------------------------------------- bars and dots


@_spec.register
def _(figure: Bars, width: int) -> Spec:
    rows = [
        {"name": name, "place": place, "value": value, "text": figure.axis.spelling(value)}
        for place, (name, value) in enumerate(zip(figure.names, figure.values, strict=True))
    ]
    tip = {"description": {"field": "tip"}}
    for row in rows:
        row["tip"] = f"{row['name']}: {row['text']}"
    value = {
        "field": "value",
        "type": "quantitative",
        "scale": {"zero": True, "nice": True},
        "axis": _axis(figure.axis, width),
    }
    limits: Spec = {
        "mark": {"type": "rule", "strokeDash": [4, 4], "color": "var(--muted)", "strokeWidth": 1.5},
    }
    if figure.limit is not None:
        limits["data"] = {"values": [{"value": figure.limit.y, "tip": figure.limit.name}]}
    if len(rows) > _NAMED_BARS:
        bars: Spec = {
            "mark": {"type": "bar", "color": _SERIES[0], "binSpacing": 0},
            "encoding": {
                "x": {
                    "field": "place",
                    "type": "ordinal",
                    "axis": {"title": f"{figure.what}, in the model's order", "labels": False},
                    "scale": {"paddingInner": 0.15},
                },
                "y": value,
                **tip,
            },
        }
        across = {"y": value, **tip, "x": {"value": 0}, "x2": {"value": "width"}}
        lines = [] if figure.limit is None else [{**limits, "encoding": across}]
        return {"height": 220, "data": {"values": rows}, "layer": [bars, *lines]}
    y = {
        "field": "place",
        "type": "ordinal",
        "axis": _names_axis(figure.names, width),
        "scale": {"paddingInner": 0.35},
    }
    layers: list[Spec] = [
        {"mark": {"type": "bar", "color": _SERIES[0], "cornerRadiusEnd": 2}, "encoding": {"x": value, **tip}},
        {
            "mark": {**_MUTE, "type": "text", "align": "left", "dx": 5, "color": "var(--ink)", "fontSize": 11},
            "encoding": {"x": value, "text": {"field": "text"}},
        },
    ]
    if figure.limit is not None:
        down = {"x": value, **tip, "y": {"value": 0}, "y2": {"value": "height"}}
        layers.append({**limits, "encoding": down})
    for layer in layers[:2]:
        layer["encoding"] = {"y": y, **layer["encoding"]}
    return {"height": {"step": 24}, "data": {"values": rows}, "layer": layers}


@_spec.register
def _(figure: Intervals, width: int) -> Spec:
    rows = [
        {
            **_coordinates(point),
            "place": place,
            "tip": f"{name}: {figure.axis.spelling(point.y)}{_between(point, figure.axis)}",
            "first": name == figure.first,
        }
        for place, (name, point) in enumerate(zip(figure.names, figure.points, strict=True))
    ]
    y = {"field": "place", "type": "ordinal", "axis": {**_names_axis(figure.names, width), "grid": True}}
    x = {
        "type": "quantitative",
        "scale": {"type": figure.axis.scale, "zero": False, "nice": True},
        "axis": {**_axis(figure.axis, width), "grid": False},
    }
    colour = {"condition": {"test": "datum.first", "value": _SERIES[1]}, "value": _SERIES[0]}
    return {
        "height": {"step": 34},
        "data": {"values": rows},
        "layer": [
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 2, "opacity": 0.6, **_MUTE},
                "encoding": {"y": y, "x": {**x, "field": "low"}, "x2": {"field": "high"}, "color": colour},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
                "encoding": {
                    "y": y,
                    "x": {**x, "field": "y"},
                    "color": colour,
                    "description": {"field": "tip"},
                },
            },
        ],
    }


def _names_axis(names: Sequence[str], width: int) -> Spec:
    """Names at places, so that two of the same name stay two."""
    return {
        "title": None,
        "labelExpr": _labels(names),
        "labelColor": "var(--ink)",
        "labelLimit": _LONGEST_NAME[width],
        "labelOverlap": False,
    }


def _labels(names: Sequence[str]) -> str:
    """An expression of Vega's for the name at a place; names are untrusted: all but plain letters is escaped."""
    quoted = ", ".join(
        '"' + "".join(one if one.isascii() and one.isalnum() else _escaped(one) for one in name) + '"'
        for name in names
    )
    return f"[{quoted}][datum.value]"


def _escaped(character: str) -> str:
    """As JavaScript's strings spell it, in UTF-16."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place]:02x}{units[place + 1]:02x}" for place in range(0, len(units), 2))


# ---------------------------------------------------------------- matrices


@_spec.register
def _(figure: Matrix, width: int) -> Spec:
    count = len(figure.names)
    numbered = count <= (_NUMBERED_CELLS if width == WIDE else 6)
    rows = [
        {
            "row": row,
            "column": column,
            "value": value,
            "text": "" if value is None else figure.axis.spelling(value),
            "tip": f"{figure.names[row]} and {figure.names[column]}: "
            + ("nothing in common" if value is None else figure.axis.spelling(value)),
        }
        for row, values in enumerate(figure.values)
        for column, value in enumerate(values)
    ]
    found = [value for values in figure.values for value in values if value is not None]
    opacity = {
        "field": "value",
        "type": "quantitative",
        # Where numbers stand in the cells, the darkest still lets them be read.
        "scale": {"domain": [0, max(found, default=1) or 1], "range": [0.04, 0.5 if numbered else 1]},
        "legend": None,
    }
    labels = {
        "labelExpr": _labels(figure.names),
        "labelOverlap": False,
        "title": None,
        "labelColor": "var(--ink)",
        "grid": False,
    }
    limit = _LONGEST_NAME[width]
    step = max(1, math.ceil(count / (24 if width == WIDE else 10)))
    shown = list(range(0, count, step))
    y = {"field": "row", "type": "ordinal", "axis": {**labels, "labelLimit": limit, "values": shown}}
    across = {"labelAngle": -40 if max(map(len, figure.names)) > 3 else 0, "orient": "bottom", "labelLimit": 120}
    x = {"field": "column", "type": "ordinal", "axis": {**labels, **across, "values": shown}}
    layers: list[Spec] = [
        {
            "mark": {"type": "rect", "color": _SERIES[0], "stroke": "var(--paper)", "strokeWidth": 1},
            "encoding": {"opacity": opacity, "description": {"field": "tip"}},
        }
    ]
    if numbered:
        layers.append(
            {
                "mark": {**_MUTE, "type": "text", "color": "var(--ink)", "fontSize": 11},
                "encoding": {"text": {"field": "text"}},
            }
        )
    side = {"step": max(8, min(44, 480 // count))} if width == WIDE else min(300, max(120, 44 * count))
    return {"height": side, "data": {"values": rows}, "encoding": {"x": x, "y": y}, "layer": layers}
