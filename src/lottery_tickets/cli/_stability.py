"""`stability`: from which step on the order of the data no longer matters to the network of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import DeviceOption, chosen_device
from lottery_tickets.cli._plan import Plan
from lottery_tickets.cli._rounds import RunArgument, checked_round, finished, mask_path, seeds_in_words
from lottery_tickets.cli._shell import Report, Session, command, new_table, with_interval
from lottery_tickets.cli._told import write_json

if TYPE_CHECKING:
    from lottery_tickets.cli._material import Material
    from lottery_tickets.masks import Mask
    from lottery_tickets.stability import Instability

_SEEDS = 3
_SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of training, where nothing says which steps


class Metric(str, Enum):
    """Whose barrier counts."""

    error = "error"
    loss = "loss"


@command(
    app,
    "stability",
    "lottery-tickets stability runs/lenet",
    "lottery-tickets stability runs/lenet --steps 0,10,50,100,500 --seeds 5 --plot",
    "lottery-tickets stability runs/lenet --round 8 --steps 0,100 -o runs/lenet/stability/tickets",
)
def stability(
    session: Session,
    run: RunArgument,
    steps: Annotated[
        str | None,
        typer.Option(
            help="Optimizer steps to look at, with commas between. Default: 0 to a half of training.",
            show_default=False,
        ),
    ] = None,
    round_: Annotated[
        int | None,
        typer.Option("--round", min=1, help="Train as the tickets of this round. Default: the dense network."),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How many networks, from seed 0 on; of tickets, how many of RUN's seeds. Default: "
            f"{_SEEDS}, or all.",
            show_default=False,
        ),
    ] = None,
    points: Annotated[int, typer.Option(min=2, help="Points on each path, ends included.")] = 11,
    metric: Annotated[Metric, typer.Option(help="Whose barrier is to be below the threshold.")] = Metric.error,
    threshold: Annotated[float, typer.Option(help="Below it a network counts as stable.")] = 0.02,
    confidence: Annotated[float, typer.Option(help="Of the intervals over seeds.")] = 0.95,
    recompute_batchnorm: Annotated[
        bool,
        typer.Option(
            "--recompute-batchnorm", help="Measure BatchNorm's statistics anew at every point of a path."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the analysis. Default: RUN/stability/dense, or round-NN.",
            show_default=False,
        ),
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw the barrier over steps to curve.png there.")] = False,
    device: DeviceOption = "auto",
) -> Report:
    """Tell which step to rewind to: train pairs of copies from step k in different orders, and look between them.

    Copies that end in one valley, with no barrier on the line between them, no longer hang on the order of the
    data: from the first such k on tickets can be expected to match the dense network. Network, data and recipe are
    those that `imp` was given; that it has begun RUN is enough, unless --round asks for its tickets.

    Every pair is written down when it is finished: a command that was killed goes on when it is given again. The
    curve goes to results.json in the same folder.
    """
    if plot:
        from lottery_tickets.reports import figure_class

        figure_class()
    plan = Plan.of(run)
    subject, own = "dense", range(seeds or _SEEDS)
    if round_ is not None:
        report = finished(run)
        checked_round(report, round_)
        subject, own = f"round-{round_:02d}", report["seeds"][:seeds]

    from lottery_tickets.cli._material import Material
    from lottery_tickets.cli._meter import metered, run_memory

    material = Material(plan, chosen_device(device))
    wanted = _steps(material, steps)
    folder = output or run / "stability" / subject
    session.settle(steps=",".join(map(str, wanted)), seeds=len(own), output=folder)
    material.rehearse()
    memory = material.planned("instability")
    measure = partial(
        _measured,
        *(material, run, round_, wanted, list(own)),
        run_dir=folder / "state",
        points=points,
        recompute_batchnorm=recompute_batchnorm,
        metric=metric.value,
        threshold=threshold,
        confidence=confidence,
        progress=session.progress,
    )
    with session.run_in(folder):
        found, cost = metered(measure, material.device)
    told = {
        "network": plan.network_name,
        "data": plan.data_name,
        "run": str(run),
        "subject": subject,
        "seeds": list(own),
        **found,
        "memory": run_memory(memory, cost, folder),
        "picture": str(folder / "curve.png") if plot else None,
    }
    if plot:
        from lottery_tickets.reports import draw, figure_of_barriers

        title = f"{told['network']} on {told['data']}, {subject}, {seeds_in_words(list(own))}"
        draw([figure_of_barriers(told)], folder / "curve.png", title)
    write_json(folder / "results.json", "stability", told)
    return Report(told, lambda console: _show(console, told))


def _measured(
    material: Material,
    run: Path,
    round_: int | None,
    steps: Sequence[int],
    seeds: Sequence[int],
    *,
    recompute_batchnorm: bool,
    **options: Any,
) -> Instability:
    from lottery_tickets.masks import Mask
    from lottery_tickets.stability import compute_instability, make_train_function

    train, validation, *test = material.make_dataloaders(seeds[0])

    def ticket(seed: int, step: int) -> Mask:
        return Mask.load(mask_path(run, seed, round_ or 0))

    recipe = material.recipe()
    del recipe["eval_every_steps"]
    return compute_instability(
        material.make_model,
        make_train_function(train, **recipe),
        steps,
        seeds,
        dataloader=test[0] if test else validation,
        mask=None if round_ is None else ticket,
        recompute_batchnorm=train if recompute_batchnorm else False,
        **options,
    )


def _steps(material: Material, given: str | None) -> list[int]:
    """Ascending, each once, and where that can be known none at which training is over."""
    if given is None:
        total = material.steps("--steps")
        return sorted({round(share * total) for share in _SHARES})
    try:
        steps = sorted({int(step) for step in given.split(",")})
    except ValueError:
        raise typer.BadParameter(f"{given!r}: whole numbers with commas between", param_hint="--steps") from None
    if material.known_steps is not None and steps[-1] >= material.known_steps:
        raise typer.BadParameter(
            f"{steps[-1]}: training has {material.known_steps} steps, and some are to be left",
            param_hint="--steps",
        )
    return steps


def _show(console: Console, told: Mapping[str, Any]) -> None:
    table = new_table(
        title=f"{told['network']} on {told['data']}, {told['subject']}, {seeds_in_words(told['seeds'])}"
    )
    for heading in ("step", "error barrier", "loss barrier", "error of the copies"):
        table.add_column(heading, justify="right")
    for point in told["curve"]:
        table.add_row(
            f"{point['rewind_step']:,}",
            with_interval(point["error_barrier"], point["error_interval"], 4),
            with_interval(point["loss_barrier"], point["loss_interval"], 4),
            with_interval(point["error"], None, 4),
        )
    console.print(table)
    console.print(_conclusion(told))
    console.print("Barrier: the most that error or loss rises on the line between two copies above their mean.")
    if len(told["seeds"]) > 1:
        console.print(f"In brackets: {told['confidence']:.0%} intervals over seeds (Student).")
    if told["picture"]:
        console.print(f"curve: {told['picture']}", soft_wrap=True)


def _conclusion(told: Mapping[str, Any]) -> str:
    bound = f"{told['metric']} barrier is below {told['threshold']:g}"
    if told["rewind_step"] is None:
        last = told["curve"][-1]["rewind_step"]
        return (
            f"No step up to {last:,} is stable: at none, and all after it, the mean {bound}. Look at later steps."
        )
    if told["interval"] is None:
        return f"Rewind to step {told['rewind_step']:,}: from there on the {bound}, for this seed."
    certain = told["certain_step"]
    interval = (
        "its whole interval at no step" if certain is None else f"its whole interval from step {certain:,} on"
    )
    return f"Rewind to step {told['rewind_step']:,}: from there on the mean {bound}, and {interval}."
