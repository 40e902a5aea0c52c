"""Tickets judged on a text: criteria beside each other, evaluations, the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lottery_tickets.reports._content import (
    Axis,
    Cell,
    Curves,
    Fact,
    Figure,
    Intervals,
    Level,
    Line,
    Point,
    Section,
    Table,
)
from lottery_tickets.reports._numbers import duration, memory, percent, plain
from lottery_tickets.reports._tickets import names_apart, ticket_name

Results = Mapping[str, Any]

_SPARSITY = Axis("sparsity", spelling=percent, percent=True)


def figures_of_comparison(results: Results) -> list[Figure]:
    """Perplexity over sparsity: a figure for each spread, a line for each criterion.

    Args:
        results: What `compare` reports.
    """
    spreads = list(dict.fromkeys(row["spread"] for row in results["rows"]))
    return [
        _perplexities(
            f"perplexity-{number}",
            f"Perplexity over sparsity: {spread}",
            _by_criterion([row for row in results["rows"] if row["spread"] == spread]),
            results,
        )
        for number, spread in enumerate(spreads, 1)
    ]


def section_of_comparison(results: Results, source: str) -> Section:
    """Criteria beside each other."""
    rows = [
        [
            Cell(row["criterion"]),
            Cell(row["spread"]),
            _cell(row["quality"]["sparsity"], percent),
            _with_interval(row["quality"]["perplexity"], row["quality"]["perplexity_interval"]),
            _with_interval(row["quality"]["performance_retention"], row["quality"]["retention_interval"]),
            _cell(row["seconds_scoring"] + row["seconds_drawing"], duration),
            _cell(row["peak_bytes"] if row["peak_device_bytes"] is None else row["peak_device_bytes"], memory),
        ]
        for row in results["rows"]
    ]
    finite = [row for row in results["rows"] if row["quality"]["perplexity"] is not None]
    best = min(finite, key=lambda row: row["quality"]["perplexity"], default=None)
    headings = ["criterion", "spread", "sparsity", "perplexity", "retention", "scoring and drawing", "peak memory"]
    return Section(
        title=f"{results['model']} on {Path(results['text']).name}",
        kind="comparison of criteria",
        source=source,
        conclusion=""
        if best is None
        else f"The least perplexity of a ticket is {plain(best['quality']['perplexity'])}, by {best['criterion']} "
        f"at sparsity {percent(best['quality']['sparsity'])} ({best['spread']}).",
        reason=f"The dense model has {plain(results['dense']['perplexity'])} on the same windows.",
        facts=[
            Fact("dense perplexity", plain(results["dense"]["perplexity"])),
            Fact("windows", plain(results["windows"])),
            Fact("tokens a window", plain(results["context"])),
        ],
        figures=figures_of_comparison(results),
        tables=[Table("Tickets", headings, rows)],
        configuration={
            name: value for name, value in results.items() if name not in ("rows", "dense", "schema", "made_with")
        },
        versions=results.get("made_with", {}),
    )


def section_of_demo(results: Results, source: str) -> Section:
    """Tickets beside random masks."""
    found = {
        name: [
            (row[kind]["sparsity"], row[kind]["perplexity"], row[kind]["perplexity_interval"])
            for row in results["tickets"]
        ]
        for name, kind in (("ticket", "ticket"), ("random mask", "random"))
    }
    return Section(
        title=f"{Path(results['model']).name} on {Path(results['text']).name}",
        kind="tickets beside chance",
        source=source,
        facts=[Fact("dense perplexity", plain(results["dense"]["perplexity"]))],
        figures=[_perplexities("perplexity", "Perplexity over sparsity", found, {"confidence": 0.95, **results})],
        configuration={name: results[name] for name in ("model", "text", "windows", "context", "seed")},
        versions=results.get("made_with", {}),
    )


def section_of_evaluation(results: Results, source: str) -> Section:
    """Tickets by their perplexity on one text."""
    dense, given = results["baseline"], results["tickets"]
    tickets = dict(zip(names_apart([ticket_name(path) for path in given]), given.values(), strict=True))
    confidence = next(iter(tickets.values()))["confidence"]
    there = {name: one for name, one in tickets.items() if one["perplexity"] is not None}
    best = min(there, key=lambda name: there[name]["perplexity"], default=None)
    shown = {"dense": dense, **there}
    columns = ("perplexity", "perplexity_interval"), ("performance_retention", "retention_interval")
    rows = [
        [
            Cell(name),
            _cell(one["sparsity"], percent),
            *(_with_interval(one[value], one[interval]) for value, interval in columns),
            _cell(one["quality_score"], plain),
        ]
        for name, one in tickets.items()
    ]
    return Section(
        title=f"Tickets of {results['model']} on {Path(results['text']).name}",
        kind="evaluation",
        source=source,
        conclusion=""
        if best is None
        else f"The least perplexity of a ticket is {plain(there[best]['perplexity'])}, of {best} at sparsity "
        f"{percent(there[best]['sparsity'])}.",
        reason=f"The dense model has {plain(dense['perplexity'])} on the same windows.",
        facts=[
            Fact("dense perplexity", plain(dense["perplexity"])),
            Fact("windows", plain(results["windows"])),
            Fact("tokens a window", plain(results["context"])),
        ],
        figures=[
            Intervals(
                "perplexity",
                "Perplexity of the tickets and of the dense model",
                f"On {plain(results['windows'])} windows of {plain(results['context'])} tokens. Lines: "
                f"{confidence:.0%} intervals over windows. Less is better.",
                Axis("perplexity", scale="log"),
                "ticket",
                list(shown),
                [Point(0, one["perplexity"], *_ends(one["perplexity_interval"])) for one in shown.values()],
                "dense",
            )
        ],
        tables=[Table("Tickets", ["ticket", "sparsity", "perplexity", "retention", "quality score"], rows)],
        notes=[
            "Retention: dense loss over ticket loss, 1 is as good as dense. Quality score: the sparsity, less "
            "what it cost."
        ],
        configuration={
            name: results[name] for name in ("model", "weights_digest", "text", "context", "windows", "dtype")
        },
        versions=results.get("made_with", {}),
    )


Measured = Mapping[str, Sequence[tuple[float, float | None, Sequence[float | None] | None]]]


def _by_criterion(rows: Sequence[Mapping[str, Any]]) -> Measured:
    found: dict[str, list[tuple[float, float | None, Sequence[float | None] | None]]] = {}
    for row in sorted(rows, key=lambda row: row["quality"]["sparsity"]):
        quality = row["quality"]
        found.setdefault(row["criterion"], []).append(
            (quality["sparsity"], quality["perplexity"], quality["perplexity_interval"])
        )
    return found


def _perplexities(slug: str, title: str, found: Measured, results: Results) -> Figure:
    lines = [
        Line(name, [Point(x, y, *_ends(interval)) for x, y, interval in values if y is not None])
        for name, values in found.items()
    ]
    windows = f"On {plain(results['windows'])} windows of {plain(results['context'])} tokens."
    intervals = f"{results['confidence']:.0%} intervals over windows. Less is better."
    dense, axis = results["dense"]["perplexity"], Axis("perplexity", scale="log")
    places = {point.x for line in lines for point in line.points}
    if len(places) > 1:
        summary = f"{windows} Bands: {intervals}"
        return Curves(slug, title, summary, _SPARSITY, axis, lines, [Level(dense, "dense")])
    there = [line for line in lines if line.points]
    return Intervals(
        slug,
        title.replace("over sparsity", "of one sparsity"),
        f"{windows} Lines: {intervals}",
        axis,
        "criterion",
        ["dense", *(line.name for line in there)],
        [Point(0, dense), *(line.points[0] for line in there)],
        "dense",
    )


def _cell(value: float | None, spelling: Any) -> Cell:
    return Cell("") if value is None else Cell(spelling(value), float(value))


def _with_interval(value: float | None, interval: Sequence[float | None] | None) -> Cell:
    if value is None:
        return Cell("not finite")
    low, high = _ends(interval)
    between = "" if low is None or high is None else f" [{plain(low)}, {plain(high)}]"
    return Cell(plain(value) + between, value)


def _ends(interval: Sequence[float | None] | None) -> tuple[float | None, float | None]:
    """Of an interval; none of one that reaches to infinity, which JSON cannot write."""
    low, high = interval or (None, None)
    return (None, None) if low is None or high is None else (low, high)
