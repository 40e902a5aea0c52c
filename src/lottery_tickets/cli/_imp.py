"""`imp`: train, prune and rewind over seeds, and tell how the tickets of every density do."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import DeviceOption, ExcludeOption, IncludeOption, chosen_device
from lottery_tickets.cli._own import check_spelling
from lottery_tickets.cli._plan import LENET, Plan
from lottery_tickets.cli._rounds import report_of, seeds_in_words, show_rounds
from lottery_tickets.cli._shell import Report, Session, command
from lottery_tickets.cli._told import write_json
from lottery_tickets.vision import DATASETS, NETWORKS

if TYPE_CHECKING:
    from lottery_tickets.cli._material import Material
    from lottery_tickets.cli._meter import Cost
    from lottery_tickets.runs import RunFolder

_ALIASES = {"lenet": LENET}
_BATCH_SIZE = 60  # Frankle and Carbin's of LeNet
_TARGET = 0.9


class Optimizer(str, Enum):
    """What trains."""

    sgd = "sgd"
    adam = "adam"
    adamw = "adamw"


class Init(str, Enum):
    """How weights are drawn."""

    torch = "torch"
    glorot = "glorot"


class Schedule(str, Enum):
    """What the learning rate does."""

    constant = "constant"
    cosine = "cosine"
    steps = "steps"


class Scope(str, Enum):
    """What is ranked together."""

    all = "global"
    layer = "layer"


class Rewinding(str, Enum):
    """What is put back after a round."""

    weights = "weights"
    learning_rate = "learning-rate"
    none = "none"


def _defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    from lottery_tickets.training import LEARNING_RATES

    found: dict[str, Any] = {"learning_rate": LEARNING_RATES[options["optimizer"].value]}
    if options["prune_fraction"] is None:
        found["target"] = _TARGET
    if options["dataset"] is not None:
        found["batch_size"] = _BATCH_SIZE
    return found


@command(
    app,
    "imp",
    "lottery-tickets imp lenet --dataset mnist --rounds 10 --target 0.9 --seeds 3 -o runs/lenet",
    "lottery-tickets imp lenet --dataset fashion-mnist --init glorot --rounds 18 --prune-fraction 0.2 "
    "--scope layer --output-fraction 0.1 --lr 1.2e-3 --epochs 20 --eval-every 100 --seeds 5 -o runs/paper",
    "lottery-tickets imp --model mynet:make --data mynet:loaders --optimizer sgd --lr 0.1 --momentum 0.9 "
    "--schedule cosine --rewind-step 500 -o runs/mine",
    "torchrun --nproc-per-node 2 -m lottery_tickets imp lenet --dataset mnist -o runs/lenet",
    asks_memory=True,
    on_ranks=True,
    defaults=_defaults,
)
def imp(
    session: Session,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="Folder of the run.")],
    network: Annotated[
        str | None,
        typer.Argument(metavar="NETWORK", help=f"One of lenet, {', '.join(NETWORKS)}.", show_default=False),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help=f"Images for NETWORK: {' or '.join(DATASETS)}.", show_default=False)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="In place of NETWORK: a function that returns a torch module with new weights. It is given the "
            "seed if it has a parameter for it.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="In place of --dataset: a function that returns (train, validation) or (train, validation, test) "
            "data loaders.",
            show_default=False,
        ),
    ] = None,
    init: Annotated[
        Init, typer.Option(help="How lenet's weights are drawn: torch's way, or glorot's, as in the paper.")
    ] = Init.torch,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of training, pruning and rewinding.")] = 10,
    target: Annotated[
        float | None, typer.Option(help=f"Sparsity of the last round. Default: {_TARGET}.", show_default=False)
    ] = None,
    prune_fraction: Annotated[
        float | None,
        typer.Option(help="In place of --target: each round removes this fraction of the weights that are left."),
    ] = None,
    output_fraction: Annotated[
        float | None, typer.Option(help="The same of the last layer, ranked by itself; 0.1 in the paper.")
    ] = None,
    layer_fraction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB=FRACTION", help="The same of the tensors with such names, '*.head.*=0.1'. Repeatable."
        ),
    ] = None,
    scope: Annotated[Scope, typer.Option(help="Rank all weights together, or each tensor by itself.")] = Scope.all,
    seeds: Annotated[int, typer.Option(min=1, help="How many times, each with a seed of its own.")] = 1,
    first_seed: Annotated[int, typer.Option(min=0, help="The first of them, the others following.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 10,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help=f"Images an update. Default: {_BATCH_SIZE}.", show_default=False),
    ] = None,
    validation: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images of the training part that are kept apart to stop early by. Default: a tenth, 5000 at "
            "most.",
            show_default=False,
        ),
    ] = None,
    optimizer: Annotated[Optimizer, typer.Option(help="What trains.")] = Optimizer.adam,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            "--lr",
            help="Default: 0.01 for sgd, 1e-3 for adam, 1e-4 for adamw.",
            show_default=False,
        ),
    ] = None,
    momentum: Annotated[float, typer.Option(help="Of sgd.")] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Of any optimizer.")] = 0.0,
    schedule: Annotated[
        Schedule,
        typer.Option(help="The learning rate stays, falls to zero, or to a tenth at half and three quarters."),
    ] = Schedule.constant,
    max_batch_size: Annotated[
        int | None, typer.Option(min=1, help="Samples that go through the network together at most.")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations. Default: an epoch's.", show_default=False)
    ] = None,
    rewind: Annotated[Rewinding, typer.Option(help="What is put back after a round.")] = Rewinding.weights,
    rewind_epoch: Annotated[int, typer.Option(min=0, help="To when, in epochs; 0 is the initialisation.")] = 0,
    rewind_step: Annotated[int | None, typer.Option(min=0, help="The same in steps.", show_default=False)] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    save_every: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between states on disk. Default: an epoch's.", show_default=False),
    ] = None,
    plot: Annotated[
        bool, typer.Option("--plot", help="Draw accuracy and early stopping over density to RUN/curves.png.")
    ] = False,
    device: DeviceOption = "auto",
) -> Report:
    """Find tickets by iterative magnitude pruning: train, prune, rewind, round after round, seed after seed.

    Tickets lie in RUN/seed-*/masks, a file for each round, the weights they are meant for in RUN/seed-*/rewind,
    and what the table tells in RUN/results.json. A run that was killed goes on when the same command is given
    again; more --seeds are added to it. Started by torchrun, processes share out every batch among them; a run may
    go on with another number of them. `verdict RUN` judges the tickets beside controls, `stability RUN` tells
    which step to rewind to.
    """
    network = _ALIASES.get(network or "", network)
    _check_names(network, dataset, model, data, batch_size=batch_size, validation=validation)
    if target is not None and prune_fraction is not None:
        raise typer.BadParameter("it says how much to remove, and --prune-fraction too", param_hint="--target")
    if momentum and optimizer is not Optimizer.sgd:
        raise typer.BadParameter(f"it is of sgd, not of {optimizer.value}", param_hint="--momentum")
    if init is not Init.torch and network != LENET:
        raise typer.BadParameter(f"{init.value} is for lenet", param_hint="--init")
    fractions = _fractions(layer_fraction or [])
    if plot:
        from lottery_tickets.reports import figure_class

        figure_class()

    from lottery_tickets.cli._material import Material, held_out_of
    from lottery_tickets.cli._meter import run_memory

    images = None if dataset is None else DATASETS[dataset]()
    if images is not None and validation is None:
        validation = held_out_of(images)
        session.settle(validation=validation)
    assert learning_rate is not None, "by _defaults"
    plan = Plan(
        network=network,
        dataset=dataset,
        model=model,
        data=data,
        init=init.value,
        batch_size=batch_size,
        validation=validation,
        epochs=epochs,
        optimizer=optimizer.value,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule.value,
        max_batch_size=max_batch_size,
        eval_every=eval_every,
        rounds=rounds,
        target=target,
        prune_fraction=prune_fraction,
        output_fraction=output_fraction,
        layer_fractions=fractions,
        scope=scope.value,
        rewind=rewind.value.replace("-", "_"),
        rewind_epoch=rewind_epoch,
        rewind_step=rewind_step,
        include=include,
        exclude=exclude,
    )
    material = Material(plan, chosen_device(device), images)
    wanted = range(first_seed, first_seed + seeds)
    material.rehearse()
    later = bool(rewind_epoch or rewind_step)
    memory = material.planned("iterative", session.group, run_dir=True, rewind_later=later)
    found, cost = _all_seeds(session, material, output, wanted, save_every=save_every)
    report = {**report_of(plan, output, found), "memory": run_memory(memory, cost, output)}
    if plot:
        from lottery_tickets.reports import draw, figures_of_rounds

        report["picture"] = str(output / "curves.png")
        if session.first:
            title = f"{report['network']} on {report['data']}, {seeds_in_words(report['seeds'])}"
            draw(figures_of_rounds(report), output / "curves.png", title)
    if session.first:
        write_json(output / "results.json", "imp", report)
    return Report(report, lambda console: show_rounds(console, report))


def _all_seeds(
    session: Session, material: Material, output: Path, seeds: Sequence[int], *, save_every: int | None
) -> tuple[dict[int, dict[str, Any]], Cost]:
    """Seed to what came of it, and what this call took; what an earlier one has finished is not done again."""
    from lottery_tickets.cli._meter import metered

    fractions = material.layer_fractions()
    with _claimed(output, material.plan, session) as run, session.run_in(output):
        found = {line["seed"]: line["results"] for line in run.lines}

        def train() -> None:
            for number, seed in enumerate(seeds, 1):
                if seed in found:
                    continue
                results = _one_seed(session, material, output / f"seed-{seed}", seed, fractions, save_every)
                run.record({"seed": seed, "results": results})
                run.save({}, {})
                found[seed] = results
                seconds = sum(one["seconds"] for one in results["rounds"])
                session.note(
                    f"seed {seed} ({number} of {len(seeds)}): {len(results['rounds'])} trainings, {seconds:.0f} s"
                )

        _, cost = metered(train, material.device)
    return {seed: found[seed] for seed in seeds}, cost


def _one_seed(
    session: Session,
    material: Material,
    folder: Path,
    seed: int,
    fractions: Mapping[str, float],
    save_every: int | None,
) -> dict[str, Any]:
    """The library's results, as JSON can hold them; evaluations on the way stay in the seed's own folder."""
    from lottery_tickets.iterative_pruning import compute_iterative_magnitude_pruning
    from lottery_tickets.training import SharedBatches

    plan = material.plan
    data = [SharedBatches(one, session.group) for one in material.make_dataloaders(seed)]
    train, validation, *test = data
    target: dict[str, Any] = {} if plan.target is None else {"target_sparsity": plan.target}
    results = compute_iterative_magnitude_pruning(
        material.make_model(seed),
        train,
        **target,
        num_iterations=plan.rounds,
        eval_dataloader=validation,
        test_dataloader=test[0] if test else None,
        prune_fraction=plan.prune_fraction,
        layer_fractions=fractions,
        scope=plan.scope,  # type: ignore[arg-type]
        rewind=plan.rewind,  # type: ignore[arg-type]
        rewind_epoch=plan.rewind_epoch,
        rewind_step=plan.rewind_step,
        include=plan.include,
        exclude=plan.exclude,
        run_dir=folder,
        save_every_steps=save_every,
        seed=seed,
        progress=session.progress,
        process_group=session.group,
        **material.recipe(),
    )
    rounds = [
        {name: value for name, value in one.items() if name != "evaluations"}
        for one in (results["dense"], *results["iterations"])
    ]
    return {
        "target_sparsity": results["target_sparsity"],
        "rewind_step": results["rewind_step"],
        "digest": results["final_mask"].digest(),
        "rounds": rounds,
    }


@contextmanager
def _claimed(folder: Path, plan: Plan, session: Session) -> Iterator[RunFolder]:
    """The folder of all seeds, which an attempt that came to train nothing does not claim."""
    from lottery_tickets._ranks import Ranks
    from lottery_tickets.runs import RunFolder

    fresh = not folder.exists()
    with RunFolder.open(folder, plan.configuration(), ranks=Ranks(session.group)) as run:
        if run.state is None:
            run.save({}, {})  # from here on the folder is of this plan only
        try:
            yield run
        except Exception:
            if run.writes and run.state is not None and not any(folder.glob("seed-*")):
                shutil.rmtree(folder if fresh else run.state.folder)
            raise


def _check_names(
    network: str | None,
    dataset: str | None,
    model: str | None,
    data: str | None,
    *,
    batch_size: int | None,
    validation: int | None,
) -> None:
    """A network on images, or a model of the user's on data of the user's."""
    if (network is None) == (model is None):
        raise typer.BadParameter("give either NETWORK or --model", param_hint="NETWORK")
    if (dataset is None) == (data is None):
        raise typer.BadParameter("give either --dataset or --data", param_hint="--dataset")
    if network is not None and network not in NETWORKS:
        raise typer.BadParameter(f"{network} is none of lenet, {', '.join(NETWORKS)}", param_hint="NETWORK")
    if dataset is not None and dataset not in DATASETS:
        raise typer.BadParameter(f"{dataset} is none of {', '.join(DATASETS)}", param_hint="--dataset")
    for option, spec in (("--model", model), ("--data", data)):
        if spec is not None:
            check_spelling(option, spec)
    for option, given in (("--batch-size", batch_size), ("--validation", validation)):
        if dataset is None and given is not None:
            raise typer.BadParameter("the loaders of --data decide it", param_hint=option)


def _fractions(given: Sequence[str]) -> dict[str, float]:
    """Glob to fraction."""
    found = {}
    for one in given:
        glob, _, fraction = one.rpartition("=")
        try:
            found[glob] = float(fraction)
        except ValueError:
            glob = ""
        if not glob:
            raise typer.BadParameter(f"{one!r} is not GLOB=FRACTION", param_hint="--layer-fraction")
    return found
