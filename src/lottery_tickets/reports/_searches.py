"""A search for early-bird tickets: when the mask had settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lottery_tickets.masks import Mask
from lottery_tickets.reports._content import (
    Axis,
    Curves,
    Fact,
    Figure,
    Intervals,
    Line,
    Point,
    Section,
    without_gaps,
)
from lottery_tickets.reports._memory import memory_bars
from lottery_tickets.reports._numbers import duration, memory, percent, plain, precise_percent
from lottery_tickets.reports._tickets import distance_matrix, layer_bars, layer_table, load_tickets

Results = Mapping[str, Any]


def within_epochs(looks: Sequence[Mapping[str, Any]]) -> bool:
    """Whether checks lie closer than epochs."""
    epochs = [look["epoch"] for look in looks]
    return len(set(epochs)) < len(epochs)


def masks_of_checks(state: Path, result: Mapping[str, Any]) -> dict[Path, str]:
    """Where the masks of the checks lie, if they were kept, to the moment of each.

    Args:
        state: The run's own folder.
        result: Of one sparsity.
    """
    looks, sparsity = result["checkpoints"], result["target_sparsity"]
    unit = "step" if within_epochs(looks) else "epoch"
    return {
        state / "masks" / f"check-{number:04d}-{sparsity}.safetensors": plain(look[unit])
        for number, look in enumerate(looks)
    }


def figure_of_distances(masks: Mapping[str, Mask], result: Mapping[str, Any]) -> Figure:
    """The matrix of pairwise mask distances."""
    unit = "step" if within_epochs(result["checkpoints"]) else "epoch"
    return distance_matrix(
        masks,
        unit,
        f"Masks of sparsity {percent(result['target_sparsity'])}, by the {unit} at which they were drawn.",
    )


def sections_of_search(
    results: Results, folder: Path, configuration: Mapping[str, Any]
) -> list[tuple[Section, dict[str, Mask]]]:
    """A section for each sparsity, with its ticket."""
    found = []
    for result, told in zip(results["results"], results["tickets"], strict=True):
        path = folder / Path(told).name
        masks = load_tickets({"ticket": path})
        section = _section(results, result, folder, configuration, masks)
        found.append((section, {f"{folder.name} {percent(result['target_sparsity'])}": m for m in masks.values()}))
    return found


def _section(
    results: Results,
    result: Mapping[str, Any],
    folder: Path,
    configuration: Mapping[str, Any],
    masks: Mapping[str, Mask],
) -> Section:
    looks, sparsity = result["checkpoints"], result["target_sparsity"]
    figures: list[Figure] = [_settling(looks)] if len(looks) > 1 else []
    checks = load_tickets({name: path for path, name in masks_of_checks(folder / "state", result).items()})
    if len(checks) > 1:
        figures.append(figure_of_distances(checks, result))
    if results["controls"]:
        figures.append(_controls(results["controls"]))
    peaks = [look["peak_bytes"] for look in looks if look["peak_bytes"] is not None]
    planned = results["memory"]
    measured = max(peaks) - planned["bytes_before"] if peaks else None
    figures.append(memory_bars(planned["plan"], measured))
    whose = f"the ticket of sparsity {percent(sparsity)}"
    tables = []
    for mask in masks.values():
        figures.append(layer_bars(mask.layer_sparsity(), whose))
        tables.append(layer_table(mask, whose))
    settled = result["converged"]
    when = [] if result["convergence_step"] is None else [Fact("at step", plain(result["convergence_step"]))]
    return Section(
        title=f"{results['model']} on {Path(results['data']).name}, sparsity {percent(sparsity)}",
        kind="early-bird ticket",
        source=str(folder),
        conclusion=f"The mask had settled at epoch {plain(result['convergence_epoch'])}."
        if settled
        else "The mask had not settled.",
        reason=f"{result['reason'][:1].upper()}{result['reason'][1:]}.",
        facts=[
            Fact("sparsity", percent(sparsity)),
            *when,
            Fact("checks", plain(len(looks))),
            Fact("training", duration(sum(look["seconds"] for look in looks))),
            *([Fact("peak memory", memory(max(peaks)))] if peaks else []),
        ],
        figures=figures,
        tables=tables,
        configuration=configuration,
        versions=results.get("made_with", {}),
    )


def _settling(looks: Sequence[Mapping[str, Any]]) -> Figure:
    unit = "step" if within_epochs(looks) else "epoch"
    found = without_gaps((look[unit], look["distances"][-1] if look["distances"] else None) for look in looks)
    chance = without_gaps((look[unit], look["null_distance"]) for look in looks)
    return Curves(
        "settling",
        "How far the mask still moves",
        "Share of the mask's bits that differ from the check before; by chance: what it would be if the weights "
        "had moved as far at random.",
        Axis(unit, ticks=[point.x for point in found]),
        Axis("mask distance", spelling=precise_percent, percent=True, from_zero=True),
        [Line("from the check before", found), *([Line("by chance", chance)] if chance else [])],
    )


def _controls(controls: Mapping[str, Any]) -> Figure:
    """Every network that was trained beside the ticket."""
    by_accuracy = all(one["accuracy"] is not None for one in controls.values())
    points = [
        Point(0, one["accuracy"], *(one["accuracy_interval"] or (None, None)))
        if by_accuracy
        else Point(0, one["test_loss"])
        for one in controls.values()
    ]
    name = "test accuracy" if by_accuracy else "test loss"
    axis = Axis(name, spelling=precise_percent if by_accuracy else plain, percent=by_accuracy)
    summary = "Trained from the same initial weights on the same batches."
    if by_accuracy:
        summary += " Lines: 95% intervals over test samples (Wilson)."
    return Intervals(
        "controls",
        f"The tickets and their controls: {name}",
        summary,
        axis,
        "network",
        list(controls),
        points,
        next((one for one in controls if one.startswith("ticket")), ""),
    )
