"""`verdict`: the tickets of a run of `imp` beside their controls."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import DeviceOption, chosen_device
from lottery_tickets.cli._plan import Plan
from lottery_tickets.cli._rounds import RunArgument, checked_round, finished, mask_path, rewind_path
from lottery_tickets.cli._shell import Report, Session, command, new_table, number, with_interval
from lottery_tickets.cli._told import write_json

if TYPE_CHECKING:
    from lottery_tickets.cli._material import Material
    from lottery_tickets.verdict import Control, TicketVerdict

_CONTROLS = "dense,random_reinit,random_mask,layer_shuffled,early_bird"
_SEEDS_OF_ONE = 5  # where one ticket is judged, and nothing says how often


class Metric(str, Enum):
    """What is judged by."""

    accuracy = "accuracy"
    loss = "loss"


class Moment(str, Enum):
    """When."""

    early_stopping = "early-stopping"
    end = "end"


@command(
    app,
    "verdict",
    "lottery-tickets verdict runs/lenet",
    "lottery-tickets verdict runs/lenet --round 6 --controls dense,random_reinit,random_mask --margin 0.01",
    asks_memory=True,
)
def verdict(
    session: Session,
    run: RunArgument,
    round_: Annotated[
        int | None, typer.Option("--round", min=1, help="Which tickets. Default: the last round's.")
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="How many of RUN's seeds, each with its ticket; of a RUN with one seed, how many orders of the "
            f"data. Default: all of RUN's, or {_SEEDS_OF_ONE} orders.",
            show_default=False,
        ),
    ] = None,
    controls: Annotated[str, typer.Option(help="Which, with commas between; dense is needed.")] = _CONTROLS,
    margin: Annotated[
        float, typer.Option(min=0, help="How much worse than the dense network is still not worse.")
    ] = 0.005,
    confidence: Annotated[float, typer.Option(help="Of each test, and of the intervals.")] = 0.95,
    metric: Annotated[
        Metric | None,
        typer.Option(help="Judge by. Default: accuracy, where data has classes.", show_default=False),
    ] = None,
    judged_at: Annotated[
        Moment, typer.Option(help="At the step of the least validation loss, or at the end.")
    ] = Moment.early_stopping,
    device: DeviceOption = "auto",
) -> Report:
    """Train tickets of a RUN of `imp` and their controls, by RUN's recipe, and judge: winning, matching, or not.

    Controls are the whole network (dense), the ticket's mask on new weights (random_reinit), as many weights
    anywhere (random_mask) or of each tensor (layer_shuffled), and the ticket that is found early (early_bird).

    A training is written down in RUN/verdict/round-NN when it is finished, and not made again: a command that was
    killed goes on, and one with more seeds or controls trains only these. results.json there has the judgement.
    """
    names: list[Any] = [name.strip().replace("-", "_") for name in controls.split(",") if name.strip()]
    plan, report = Plan.of(run), finished(run)
    place = checked_round(report, round_)
    chosen, folder = _seeds(report, seeds), run / "verdict" / f"round-{place:02d}"
    if len(report["seeds"]) == 1:
        folder = folder.with_name(f"{folder.name}-seed-{chosen[0]}")
    by = metric or (Metric.accuracy if "accuracy" in report["rounds"][place]["numbers"] else Metric.loss)
    session.settle(round_=place, seeds=len(chosen), metric=by)
    from lottery_tickets.cli._material import Material
    from lottery_tickets.cli._meter import metered, run_memory

    material = Material(plan, chosen_device(device))
    material.rehearse()
    memory = material.planned("verdict")
    judge = partial(
        _judged,
        session,
        *(material, run, report, place, chosen, folder),
        controls=names,
        margin=margin,
        confidence=confidence,
        metric=by.value,
        judged_at=judged_at.value.replace("-", "_"),
    )
    with session.run_in(folder):
        judged, cost = metered(judge, material.device)
    told = {
        "network": plan.network_name,
        "data": plan.data_name,
        "run": str(run),
        "round": place,
        "sparsity": report["rounds"][place]["sparsity"],
        **judged,
        "start": _start(report),
        "memory": run_memory(memory, cost, folder),
        "trainings": [_without_evaluations(one) for one in judged["trainings"]],
    }
    write_json(folder / "results.json", "verdict", told)
    return Report(told, lambda console: _show(console, told))


def _judged(
    session: Session,
    material: Material,
    run: Path,
    report: Mapping[str, Any],
    place: int,
    seeds: list[int],
    folder: Path,
    *,
    controls: list[Control],
    **standard: Any,
) -> TicketVerdict:
    """A ticket for each seed, or one for all where the run has but one."""
    from lottery_tickets.masks import Mask
    from lottery_tickets.verdict import compute_ticket_verdict

    own = report["seeds"]
    masks = [Mask.load(mask_path(run, seed, place)) for seed in own[: len(seeds)]]
    rewound = [rewind_path(run, seed) for seed in own[: len(seeds)]] if report["rewind_step"] else None
    one = len(own) == 1
    return compute_ticket_verdict(
        material.make_model,
        material.make_dataloaders,
        masks[0] if one else masks,
        seeds,
        controls,
        initial=rewound[0] if one and rewound else rewound,
        run_dir=folder / "state",
        progress=session.progress,
        **standard,
        **material.recipe(),
    )


def _seeds(report: Mapping[str, Any], wanted: int | None) -> list[int]:
    """Of the run; where it has only one, those that follow it."""
    own: list[int] = report["seeds"]
    if len(own) == 1:
        return list(range(own[0], own[0] + (wanted or _SEEDS_OF_ONE)))
    if wanted is not None and wanted > len(own):
        raise typer.BadParameter(
            f"{report['run']} has {len(own)} seeds; imp adds more to it with --seeds {wanted}",
            param_hint="--seeds",
        )
    return own[:wanted]


def _start(report: Mapping[str, Any]) -> str:
    """Where a ticket's training here is not the one that it had in its round, that."""
    weights = "their initial weights"
    if report["rewind_step"]:
        weights = f"the weights of step {report['rewind_step']}, but random_reinit's"
    elif report["rewind"] != "weights":
        weights = "their initial weights, which the run itself did not rewind to"
    return f"All networks are trained for all epochs from {weights}."


def _without_evaluations(training: Mapping[str, Any]) -> dict[str, Any]:
    """They stay in the folder of the trainings."""
    return {name: value for name, value in training.items() if name != "evaluations"}


def _show(console: Console, told: Mapping[str, Any]) -> None:
    score, early = told["score"], told["score"].startswith("early_stopping_")
    name = f"{told['measured_on']} {score.removeprefix('early_stopping_')}"
    table = new_table(
        title=f"{told['network']} on {told['data']}, round {told['round']},\n"
        f"sparsity {told['sparsity']:.4f}, {told['seeds']} seeds"
    )
    table.add_column("network")
    for heading in (f"{name}\n{'stopped early' if early else 'at the end'}", "ticket minus it", "stopped at step"):
        table.add_column(heading, justify="right")
    for network, numbers in told["networks"].items():
        difference = told["differences"].get(network, {}).get(score)
        table.add_row(
            network,
            with_interval(numbers[score]["mean"], numbers[score]["interval"], 4),
            "" if difference is None else with_interval(difference["mean"], difference["interval"], 4),
            number(numbers["early_stopping_step"]["mean"], 0),
        )
    console.print(table)
    console.print(f"{told['verdict']}. {told['reason']}")
    console.print(told["start"])
    console.print(f"Seeds are a sample of {told['population']}.")
    console.print(
        f"In brackets: {told['confidence']:.0%} intervals over seeds (Student). Stopped early: at the step of the "
        "least validation loss."
    )
