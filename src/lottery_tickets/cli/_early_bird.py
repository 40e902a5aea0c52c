"""`early-bird`: train until the mask has settled, and save the ticket."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ExcludeOption,
    IncludeOption,
    Unit,
    chosen_device,
)
from lottery_tickets.cli._shell import Report, Session, command, new_table, number, with_interval
from lottery_tickets.cli._subjects import TextOptions, check_names, subject_of
from lottery_tickets.cli._told import write_json
from lottery_tickets.errors import EvaluationError

if TYPE_CHECKING:
    from lottery_tickets._controls import Trained
    from lottery_tickets.cli._subjects import Subject
    from lottery_tickets.early_bird import EarlyBirdResults


class Rule(str, Enum):
    """When a mask has settled."""

    window = "window"
    queue = "queue"
    rank_correlation = "rank_correlation"


class Optimizer(str, Enum):
    """What trains."""

    sgd = "sgd"
    adamw = "adamw"
    adamw8bit = "adamw8bit"


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    from lottery_tickets.detection import EarlyBirdDetector
    from lottery_tickets.training import LEARNING_RATES

    sparsities = options["sparsity"] or [0.5]
    detectors = [EarlyBirdDetector(options["criterion"].value, sparsity=one) for one in sparsities]
    found: dict[str, Any] = {
        "sparsity": sparsities,
        "window": detectors[0].window,
        "learning_rate": LEARNING_RATES[options["optimizer"].value],
    }
    if len({one.threshold for one in detectors}) == 1:  # else each sparsity has its own
        found["threshold"] = detectors[0].threshold
    if options["controls"]:
        found["control_epochs"] = options["epochs"]
    return found


@command(
    app,
    "early-bird",
    "lottery-tickets early-bird lenet-300-100 --data mnist --sparsity 0.5 --controls -o runs/lenet",
    "lottery-tickets early-bird ./my-model --data book.txt --check-every-steps 8 --epochs 1 -o runs/my-model",
    "torchrun --nproc-per-node 2 -m lottery_tickets early-bird lenet-300-100 --data mnist -o runs/lenet",
    asks_memory=True,
    on_ranks=True,
    defaults=_defaults,
)
def early_bird(
    session: Session,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="lenet-300-100, batchnorm-cnn, residual-cnn, or a causal language model: a folder or a hub id.",
        ),
    ],
    data: Annotated[str, typer.Option("--data", help="mnist or fashion-mnist, or a UTF-8 text file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            "--sparsity", "-s", help="Fraction to remove. Repeatable: one training serves all. Default: 0.5."
        ),
    ] = None,
    criterion: Annotated[Rule, typer.Option(help="When a mask has settled.")] = Rule.window,
    threshold: Annotated[
        float | None, typer.Option(help="Largest distance, or least correlation; default: the criterion's.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Checks that must agree; default: the criterion's.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs to train at most.")] = 30,
    check_interval: Annotated[int, typer.Option(min=1, help="Epochs between checks.")] = 1,
    check_every_steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps between checks, instead of epochs.")
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="What trains.")] = Optimizer.sgd,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", "--lr", help="Default: 0.01 for sgd, 1e-4 for adamw.")
    ] = None,
    momentum: Annotated[float, typer.Option(help="Of sgd; takes the weights' bytes again.")] = 0.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples an update.")] = 64,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples that go through the model together at most.")
    ] = None,
    context: Annotated[int, typer.Option(min=2, help="Tokens per sequence of a text.")] = 512,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences of the text; default: all.")] = None,
    start: Annotated[int, typer.Option(min=0, help="Characters of the text to skip at its beginning.")] = 0,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Train the ticket from its initial weights, the dense network and a random mask, each by the "
            "same optimizer for as many epochs (images only).",
        ),
    ] = False,
    control_epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs to train ticket and controls; default: --epochs.")
    ] = None,
    structure: Annotated[
        Unit | None,
        typer.Option(help="Watch and remove whole units, not weights; the sparsity is the share of them."),
    ] = None,
    bn_l1: Annotated[
        float, typer.Option(min=0, help="L1 penalty on scales of batch normalisation while searching.")
    ] = 0.0,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw the distances between all masks to RUN/distances-SPARSITY.png.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of initial weights, data order and random masks.")] = 0,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> Report:
    """Train a model until its magnitude mask has settled, and save the mask as a ticket.

    Checks draw the mask and compare it with those before. A run that was killed goes on from its last check when
    the same command is given again. Started by torchrun, processes share out every batch among them; a run may go
    on with another number of them. RUN gets early-bird-SPARSITY.safetensors, results.json, and the run's own
    state in RUN/state, which may be deleted afterwards.
    """
    check_names(model, data)
    if controls and session.group is not None:
        raise typer.BadParameter("it trains in one process; call without torchrun", param_hint="--controls")
    sparsities = sorted(set(sparsity or ()))
    if plot:
        from lottery_tickets.reports import figure_class

        figure_class()

    from lottery_tickets.cli._meter import forget_peak, resident_bytes
    from lottery_tickets.early_bird import compute_early_bird_tickets
    from lottery_tickets.planning import plan_memory
    from lottery_tickets.training import SharedBatches, tensors_of

    where = chosen_device(device)
    _rehearse(optimizer.value)
    before = resident_bytes() if where.type == "cpu" else 0
    subject = subject_of(
        model,
        data,
        batch_size=batch_size,
        seed=seed,
        text=TextOptions(context, samples, start),
        dtype=dtype.for_scoring(where),
        device=where,
        progress=session.progress,
    )
    forget_peak()  # of reading the data
    if controls and subject.test_data is None:
        raise typer.BadParameter("a text has no classes to be right about", param_hint="--controls")
    plan = plan_memory(
        subject.model,
        "early-bird",
        batch_size=batch_size,
        sequence_length=context,
        optimizer=optimizer.value,
        momentum=momentum,
        max_batch_size=max_batch_size,
        criterion=criterion.value,
        include=include,
        exclude=exclude,
    )
    initial = {name: one.clone() for name, one in tensors_of(subject.model).items()} if controls else {}
    with session.run_in(output):
        results = compute_early_bird_tickets(
            subject.model,
            SharedBatches(subject.train_data, session.group),
            max_epochs=epochs,
            check_interval=check_interval,
            target_sparsity=sparsities,
            convergence_threshold=threshold,
            stability_window=window,
            max_batch_size=max_batch_size,
            learning_rate=learning_rate,
            criterion=criterion.value,
            check_every_steps=check_every_steps,
            optimizer=optimizer.value,
            momentum=momentum,
            include=include,
            exclude=exclude,
            run_dir=output / "state",
            seed=seed,
            structure=None if structure is None else structure.value,
            bn_l1=bn_l1,
            progress=session.progress,
            save_masks=plot,
            process_group=session.group,
        )
        tickets, pictures = [output / _name(result) for result in results], []
        if session.first:
            for path, result in zip(tickets, results, strict=True):
                _save(path, subject, result, optimizer.value, seed)
            pictures = [_drawn(output, result) for result in results] if plot else []
        trained: dict[str, Trained] = {}
        if controls:
            recipe = {"epochs": control_epochs, "optimizer": optimizer.value, "learning_rate": learning_rate}
            trained = _controls(session, subject, initial, results, {**recipe, "momentum": momentum, "seed": seed})
    report = {
        "model": subject.name,
        "data": data,
        "results": [_without_mask(result) for result in results],
        "tickets": [str(path) for path in tickets],
        "pictures": [str(path) for path in pictures],
        "controls": trained,
        "memory": {"plan": plan.as_dict(), "bytes_before": before},
    }
    if session.first:
        write_json(output / "results.json", "early-bird", report)
    return Report(report, lambda console: _show(console, report))


def _rehearse(optimizer: str) -> None:
    """Train a few weights for a step: what libraries load for it is not to be measured with a run."""
    import torch

    from lottery_tickets.cli._meter import rehearsing
    from lottery_tickets.early_bird import compute_early_bird_tickets

    data = [(torch.zeros(2, 2), torch.tensor([0, 1]))]
    with rehearsing():
        compute_early_bird_tickets(
            torch.nn.Linear(2, 2), data, max_epochs=1, optimizer=optimizer, learning_rate=0.1, progress=False
        )


def _name(result: EarlyBirdResults) -> str:
    return f"early-bird-{result['target_sparsity']}.safetensors"


def _save(path: Path, subject: Subject, result: EarlyBirdResults, optimizer: str, seed: int) -> None:
    told: Mapping[str, object] = {
        "criterion": "magnitude" if result["final_mask"].units is None else "units",
        "target_sparsity": result["target_sparsity"],
        "early_bird": result["method"],
        "converged": result["converged"],
        "convergence_epoch": result["convergence_epoch"],
        "optimizer": optimizer,
        "seed": seed,
    }
    metadata = {key: str(value) for key, value in told.items()}
    result["final_mask"].save(path, metadata={**subject.origin, **metadata})


def _drawn(output: Path, result: EarlyBirdResults) -> Path:
    from lottery_tickets.masks import Mask
    from lottery_tickets.reports import draw, figure_of_distances, masks_of_checks

    paths = masks_of_checks(output / "state", result)
    missing = next((path for path in paths if not path.exists()), None)
    if missing is not None:
        raise EvaluationError(
            f"{missing} is missing: this run began without --plot, and its masks were not kept. Give another -o."
        )
    masks = {moment: Mask.load(path) for path, moment in paths.items()}
    picture = output / f"distances-{result['target_sparsity']}.png"
    draw([figure_of_distances(masks, result)], picture, f"sparsity {result['target_sparsity']}")
    return picture


def _controls(
    session: Session,
    subject: Subject,
    initial: Mapping[str, Any],
    results: Sequence[EarlyBirdResults],
    recipe: Mapping[str, Any],
) -> dict[str, Trained]:
    from lottery_tickets._controls import train_side_by_side
    from lottery_tickets.masks import Mask

    masks: dict[str, Mask | None] = {"dense": None}
    for result in results:
        ticket = result["final_mask"]
        masks[f"ticket {result['target_sparsity']}"] = ticket
        masks[f"random {result['target_sparsity']}"] = Mask.random_like(ticket, recipe["seed"])
    session.note(
        f"training {len(masks)} networks for {recipe['epochs']} epochs each from the same initial weights"
    )
    assert subject.test_data is not None
    return train_side_by_side(
        *(subject.model, initial, masks, subject.train_data, subject.test_data),
        **recipe,
        progress=session.progress,
    )


def _without_mask(result: EarlyBirdResults) -> dict[str, Any]:
    """The result as JSON can hold it: of the mask its digest."""
    return {
        **{key: value for key, value in result.items() if key != "final_mask"},
        "digest": result["final_mask"].digest(),
    }


def _show(console: Console, report: Mapping[str, Any]) -> None:
    table = new_table(title=f"Early-bird tickets of {report['model']} on {Path(report['data']).name}")
    for heading in ("sparsity", "settled", "at epoch", "at step", "distance", "by chance", "moved"):
        table.add_column(heading, justify="right")
    table.add_column("ticket", overflow="fold")
    for result, path in zip(report["results"], report["tickets"], strict=True):
        last = result["checkpoints"][-1]
        table.add_row(
            f"{result['target_sparsity']}",
            "yes" if result["converged"] else "no",
            str(result["convergence_epoch"] or "-"),
            str(result["convergence_step"] or "-"),
            number(last["distances"][-1] if last["distances"] else None, 4),
            number(result["null_distance"], 4),
            number(last["moved_fraction"], 3),
            path,
        )
    console.print(table)
    for result in report["results"]:
        console.print(f"{result['target_sparsity']}: {result['reason']}.")
    console.print(
        "Distance: share of the mask's bits that differ from the check before; by chance: what it would be if the "
        "weights had moved as far at random; moved: share of the weights that moved at all."
    )
    if report["controls"]:
        _show_controls(console, report["controls"])
    for path in report["pictures"]:
        console.print(f"distances between all masks: {path}")


def _show_controls(console: Console, trained: Mapping[str, Any]) -> None:
    table = new_table(title="\nTrained from the same initial weights on the same batches")
    table.add_column("network")
    for heading in ("sparsity", "test accuracy", "test loss"):
        table.add_column(heading, justify="right")
    for name, one in trained.items():
        table.add_row(
            name,
            number(one["sparsity"], 3),
            with_interval(one["accuracy"], one["accuracy_interval"], 4),
            number(one["test_loss"], 4),
        )
    console.print(table)
    console.print(
        "In brackets: 95% intervals over test samples (Wilson). A random mask removes as many of each tensor."
    )
