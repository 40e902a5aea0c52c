"""Verdicts, and the step to rewind to."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
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
from lottery_tickets.reports._memory import memory_bars
from lottery_tickets.reports._numbers import percent, plain
from lottery_tickets.reports._rounds import score_axis

Results = Mapping[str, Any]

_SENTENCES = {
    "winning": "A winning ticket",
    "matching": "A matching ticket",
    "not a ticket": "Not shown to be a ticket",
}
_MOST_PATHS = 6


def section_of_verdict(results: Results, source: str) -> Section:
    """A ticket beside its controls."""
    score = results["score"]
    early = score.startswith("early_stopping_")
    name = f"{results['measured_on']} {score.removeprefix('early_stopping_')}"
    axis, networks = score_axis(name), results["networks"]
    moment = "stopped early" if early else "at the end"
    over = f"{results['confidence']:.0%} intervals over {results['seeds']} seeds"
    figures: list[Figure] = [
        Intervals(
            "networks",
            f"The ticket and its controls: {name}, {moment}",
            f"Means and {over}. {results['start']}",
            axis,
            "network",
            [_readable(one) for one in networks],
            [_mean_point(numbers[score]) for numbers in networks.values()],
            "ticket",
        ),
        memory_bars(results["memory"]["plan"], results["memory"]["peak_bytes"]),
    ]
    differences = {one: numbers[score] for one, numbers in results["differences"].items()}
    rows = [
        [
            Cell(_readable(test["control"])),
            Cell(_readable(test["claim"])),
            Cell(_signed(test["mean_gain"]), test["mean_gain"]),
            Cell(f"{test['p_value']:.2g}", test["p_value"]),
            Cell("shown" if test["shown"] else "the opposite shown" if test["refuted"] else "cannot be told"),
        ]
        for test in results["tests"]
    ]
    tables = [
        Table("What the verdict rests on", ["control", "claim", "mean gain", "p", "outcome"], rows),
        Table(
            f"The ticket minus each control, {moment}, paired by seed",
            ["control", "difference", "from", "to"],
            [
                [
                    Cell(_readable(one)),
                    Cell(_signed(found["mean"]), found["mean"]),
                    *(Cell(_signed(end), end) for end in found["interval"]),
                ]
                for one, found in differences.items()
            ],
        ),
    ]
    judged = _SENTENCES.get(results["verdict"], str(results["verdict"]))
    return Section(
        title=f"Verdict on round {results['round']} of {results['network']} on {results['data']}",
        kind="verdict",
        source=source,
        conclusion=f"{judged}, at {percent(1 - results['sparsity'])} of the weights.",
        reason=results["reason"],
        facts=[
            Fact("sparsity", percent(results["sparsity"])),
            Fact("seeds", plain(results["seeds"])),
            Fact("margin", plain(results["margin"])),
            Fact("confidence", percent(results["confidence"])),
        ],
        figures=figures,
        tables=tables,
        notes=[f"Seeds are a sample of {results['population']}."],
        configuration={
            name: results[name]
            for name in ("run", "round", "score", "measured_on", "margin", "confidence", "seeds")
        },
        versions=results.get("made_with", {}),
    )


def figure_of_barriers(results: Results) -> Curves:
    """Barrier between copies over the step at which they parted, with intervals over seeds.

    Args:
        results: What `stability` reports.

    References:
        Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML 2020, figure 3.
    """
    metric = results["metric"]
    points = [
        Point(one["rewind_step"], one[f"{metric}_barrier"], *(one[f"{metric}_interval"] or (None, None)))
        for one in results["curve"]
    ]
    over = (
        f" Bands: {results['confidence']:.0%} intervals over {len(results['seeds'])} seeds."
        if len(results["seeds"]) > 1
        else ""
    )
    return Curves(
        "barriers",
        f"{metric.capitalize()} barrier over the step at which copies part",
        f"How far the {metric} rises on the line between two copies trained in different orders.{over} Below the "
        "dashed line a network counts as stable.",
        Axis("step", scale="symlog", ticks=[point.x for point in points]),
        score_axis(f"{metric} barrier" if metric == "loss" else "barrier of the error"),
        [Line("barrier", points)],
        [Level(results["threshold"], "stable below")],
    )


def section_of_stability(results: Results, source: str) -> Section:
    """From which step on the order of the data no longer matters."""
    step, certain = results["rewind_step"], results["certain_step"]
    seeds = results["seeds"]
    measured = memory_bars(results["memory"]["plan"], results["memory"]["peak_bytes"])
    figures: list[Figure] = [figure_of_barriers(results), _paths(results), measured]
    return Section(
        title=f"Stability of {results['network']} on {results['data']}, {results['subject']}",
        kind="linear mode connectivity",
        source=source,
        conclusion="No step that was looked at is stable."
        if step is None
        else f"Rewind to step {plain(step)}: from there on the mean {results['metric']} barrier is below "
        f"{plain(results['threshold'])}.",
        reason=""
        if len(seeds) == 1
        else "The whole interval is below it at no step."
        if certain is None
        else f"From step {plain(certain)} on the whole interval is.",
        facts=[
            Fact("stable from step", "none" if step is None else plain(step)),
            Fact("threshold", plain(results["threshold"])),
            Fact("seeds", plain(len(seeds))),
        ],
        figures=figures,
        configuration={
            name: results[name] for name in ("run", "subject", "seeds", "metric", "threshold", "confidence")
        },
        versions=results.get("made_with", {}),
    )


def _paths(results: Results) -> Curves:
    """What lies between the copies, on the mean over seeds."""
    metric = results["metric"]
    name = "errors" if metric == "error" else "losses"
    steps = [one["rewind_step"] for one in results["curve"]]
    stride = -(-len(steps) // _MOST_PATHS)
    lines = []
    for step in steps[::stride]:
        mine = [pair for pair in results["pairs"] if pair["rewind_step"] == step]
        means = [fmean(values) for values in zip(*(pair[name] for pair in mine), strict=True)]
        points = [Point(alpha, mean) for alpha, mean in zip(mine[0]["alphas"], means, strict=True)]
        lines.append(Line(f"step {plain(step)}", points))
    return Curves(
        "paths",
        f"The {metric} on the line between two copies",
        "Left and right the copies themselves, between them their mixtures; a hill between them is a barrier. "
        "Means over seeds.",
        Axis("share of the second copy", spelling=percent, percent=True),
        score_axis(metric),
        lines,
    )


def _readable(name: str) -> str:
    return name.replace("_", " ")


def _mean_point(found: Mapping[str, Any]) -> Point:
    return Point(0, found["mean"], *(found["interval"] or (None, None)))


def _signed(value: float) -> str:
    return f"{value:+.4f}"
