"""A run of iterative pruning: accuracy over density, round after round."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lottery_tickets.reports._content import Axis, Curves, Fact, Figure, Line, Point, Section
from lottery_tickets.reports._memory import memory_bars
from lottery_tickets.reports._numbers import duration, percent, plain, precise_percent
from lottery_tickets.reports._tickets import distance_matrix, layer_bars, layer_table, load_tickets

Results = Mapping[str, Any]


def scores_of(results: Results) -> tuple[str, str, str]:
    """Names of the number to look at when stopped early and at the end, and what to call it."""
    test = "test_" if results["measured_on"] == "test" else ""
    if f"{test}accuracy" in results["rounds"][0]["numbers"]:
        return f"early_stopping_{test}accuracy", f"{test}accuracy", f"{results['measured_on']} accuracy"
    return f"early_stopping_{test}loss", "test_loss" if test else "eval_loss", f"{results['measured_on']} loss"


def figures_of_rounds(results: Results) -> list[Figure]:
    """Accuracy (or loss) and early-stopping step over density, with intervals over seeds.

    Args:
        results: What `imp` reports.

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, figures 1 and 4: the same two curves.
    """
    early, end, name = scores_of(results)
    rounds = results["rounds"]
    over = _over_seeds(results)
    by_density = density_axis([one["density"] for one in rounds])
    score = score_axis(name)
    lines = [
        Line(label, points)
        for label, key in (("stopped early", early), ("at the end", end))
        if (points := _points(rounds, key))
    ]
    figures: list[Figure] = [
        Curves(
            "accuracy",
            f"{score.title.capitalize()} over density",
            f"From the dense network on the left to the sparsest ticket on the right.{over} Stopped early: at the "
            "step of the least validation loss.",
            by_density,
            score,
            lines,
        )
    ]
    steps = _points(rounds, "early_stopping_step")
    if steps:
        figures.append(
            Curves(
                "early-stopping",
                "When training could have stopped",
                f"The step of the least validation loss: the lower, the sooner a network has learnt.{over}",
                by_density,
                Axis("early-stopping step"),
                [Line("early-stopping step", steps)],
            )
        )
    return figures


def section_of_rounds(results: Results, folder: Path, configuration: Mapping[str, Any]) -> Section:
    """What `imp` found.

    Args:
        results: What it reports.
        folder: Of the run, where its tickets lie.
        configuration: Of the run.
    """
    rounds, seeds = results["rounds"], results["seeds"]
    last, first_seed = rounds[-1], seeds[0]
    tickets = load_tickets(
        {
            percent(one["density"]): folder
            / f"seed-{first_seed}"
            / "masks"
            / f"round-{one['round']:02d}.safetensors"
            for one in rounds
            if one["round"]
        }
    )
    figures = figures_of_rounds(results)
    layers = results["runs"][str(first_seed)]["rounds"][-1]["layer_sparsities"]
    whose = f"the sparsest ticket of seed {first_seed}"
    figures.append(layer_bars(layers, whose))
    if len(tickets) > 1:
        figures.append(
            distance_matrix(tickets, "density", f"Between the tickets of seed {first_seed}, by weights left.")
        )
    figures.append(memory_bars(results["memory"]["plan"], results["memory"]["peak_bytes"]))
    tables = [layer_table(list(tickets.values())[-1], whose)] if tickets else []
    early, _, name = scores_of(results)
    seconds = sum(one["seconds"] for run in results["runs"].values() for one in run["rounds"])
    return Section(
        title=f"{results['network']} on {results['data']}",
        kind="iterative magnitude pruning",
        source=str(folder),
        conclusion=_conclusion(rounds, early, name),
        reason=_best(rounds, early, name),
        facts=[
            Fact("weights left", percent(last["density"])),
            Fact("rounds", plain(last["round"])),
            Fact("seeds", plain(len(seeds))),
            Fact("training", duration(seconds)),
        ],
        figures=figures,
        tables=tables,
        configuration=configuration,
        versions=results.get("made_with", {}),
    )


def density_axis(densities: Sequence[float]) -> Axis:
    """Logarithmic, the dense network on the left, ticks at the densities themselves."""
    ticks = sorted(set(densities), reverse=True)
    return Axis("weights left", scale="log", falling=True, spelling=percent, percent=True, ticks=ticks)


def score_axis(name: str) -> Axis:
    """Of an accuracy or of a loss."""
    shares = name.endswith("accuracy") or name.endswith("error")
    return Axis(name, spelling=precise_percent if shares else plain, percent=shares)


def mean_points(values: Mapping[float, Sequence[float]]) -> list[Point]:
    """At each place the mean, and the least and the greatest."""
    return [
        Point(place, statistics.fmean(found), *((min(found), max(found)) if len(found) > 1 else (None, None)))
        for place, found in sorted(values.items())
    ]


def _over_seeds(results: Results) -> str:
    count = len(results["seeds"])
    return f" Bands: {results['confidence']:.0%} intervals over {count} seeds." if count > 1 else ""


def _points(rounds: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
    return [
        Point(one["density"], found["mean"], *(found["interval"] or (None, None)))
        for one in rounds
        if (found := one["numbers"].get(name)) is not None
    ]


def _conclusion(rounds: Sequence[Mapping[str, Any]], early: str, name: str) -> str:
    dense, last = (one["numbers"].get(early) for one in (rounds[0], rounds[-1]))
    if dense is None or last is None:
        return f"The sparsest ticket keeps {percent(rounds[-1]['density'])} of the weights."
    spelling = score_axis(name).spelling
    return (
        f"At {percent(rounds[-1]['density'])} of the weights the ticket has a {name} of {spelling(last['mean'])}; "
        f"the dense network has {spelling(dense['mean'])}."
    )


def _best(rounds: Sequence[Mapping[str, Any]], early: str, name: str) -> str:
    """The sparsest round whose mean is no worse than the dense network's."""
    sign = 1 if name.endswith("accuracy") else -1
    found = {one["round"]: one["numbers"].get(early) for one in rounds}
    if any(one is None for one in found.values()):
        return ""
    means = {number: sign * one["mean"] for number, one in found.items() if one is not None}
    as_good = [number for number in means if number and means[number] >= means[0]]
    if not as_good:
        return "No ticket's mean reaches that of the dense network. A verdict tells whether that is chance."
    density = next(one["density"] for one in rounds if one["round"] == max(as_good))
    return (
        f"The sparsest ticket whose mean is no worse than the dense network's keeps {percent(density)} of the "
        "weights. A verdict tells whether that is chance, and holds it against controls."
    )
