"""`mask`: draw tickets from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
    ModelArgument,
    OtherWeightsOption,
    check_drawn_from,
    chosen_device,
    model_name,
)
from lottery_tickets.cli._calibration import BatchSizeOption, SamplesOption
from lottery_tickets.cli._computing import (
    CheckpointOption,
    ChunkSizeOption,
    ClipOption,
    Computing,
    RoundsOption,
    StoreName,
    StoreOption,
)
from lottery_tickets.cli._criteria import CRITERIA, Criterion, criterion_option
from lottery_tickets.cli._scoring import Calibration, read_scored, score_model
from lottery_tickets.cli._shell import Report, Session, command, new_table
from lottery_tickets.cli._spreads import (
    AllocationOption,
    Remainder,
    RemainderOption,
    Scope,
    Spread,
    draw,
    parsed_allocation,
    rehearse,
)
from lottery_tickets.errors import CheckpointError

if TYPE_CHECKING:
    from lottery_tickets.masks import Mask


@command(
    app,
    "mask",
    "lottery-tickets mask HuggingFaceTB/SmolLM2-135M --sparsity 0.5 --sparsity 0.9 -o tickets",
    "lottery-tickets mask ./my-model --sparsity 0.7 --allocation erk --exclude '*.down_proj.weight' -o tickets",
    "lottery-tickets mask ./my-model --criterion wanda --pattern 2:4 --calibration book.txt -o tickets",
    "lottery-tickets mask ./my-model --scores scores/fisher.safetensors --sparsity 0.5 -o tickets",
    asks_memory=True,
)
def mask(
    session: Session,
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tickets; made if missing.")],
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            "--sparsity",
            "-s",
            help="Fraction to remove, in [0, 1); give it once per ticket. A pattern has its own.",
        ),
    ] = None,
    scope: Annotated[
        Scope | None,
        typer.Option(
            help="One threshold for all tensors, one for each, or one for each output row. "
            "Default: row for wanda, global for others."
        ),
    ] = None,
    allocation: AllocationOption = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="Keep N of every M consecutive weights along the inputs, 2:4 for one."),
    ] = None,
    pattern_remainder: RemainderOption = Remainder.error,
    min_density: Annotated[
        float | None, typer.Option(help="Every tensor keeps at least this share; the total stays exact.")
    ] = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    criterion: Annotated[
        Criterion | None, criterion_option("What weights are ranked by. Default: magnitude.")
    ] = None,
    scores: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rank by scores that 'lottery-tickets score' saved.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(metavar="FILE", help="UTF-8 text that scores are computed from.")
    ] = None,
    calibration_start: Annotated[
        int | None,
        typer.Option(min=0, help="Character at which the calibration text begins.", show_default="0"),
    ] = None,
    samples: SamplesOption = 128,
    context: Annotated[int, typer.Option(min=2, help="Tokens per sequence of the calibration text.")] = 512,
    batch_size: BatchSizeOption = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of criteria that draw at random.")] = 0,
    store: StoreOption = StoreName.cpu,
    chunk_size: ChunkSizeOption = None,
    checkpoint_activations: CheckpointOption = False,
    gradient_clip: ClipOption = None,
    rounds: RoundsOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    other_weights: OtherWeightsOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace tickets that exist.")] = False,
) -> Report:
    """Draw tickets from a model: one file per sparsity, all from one ranking of the weights.

    Exactly round(sparsity * N) of the N prunable weights are removed, those that rank lowest by the criterion. The
    files are called CRITERION-SPARSITY.safetensors (wanda-2of4 for a pattern), and say what they were drawn from.
    """
    sparsities = sparsity or []
    _check_usage(sparsities, pattern, criterion, scores, calibration)
    if calibration is None and calibration_start is not None:
        raise typer.BadParameter("of which text?", param_hint="--calibration-start")
    computing = Computing(seed, store.value, chunk_size, checkpoint_activations, gradient_clip, rounds)
    computing.check([criterion or CRITERIA["magnitude"]])
    spread = Spread(
        scope.value if scope else None,
        parsed_allocation(allocation),
        pattern,
        pattern_remainder.value,
        min_density,
    )
    saved = None if scores is None else read_scored(scores)
    chosen = saved.criterion if saved else criterion or CRITERIA["magnitude"]
    spread.check(chosen)
    paths = [output / f"{chosen.name}-{name}.safetensors" for name in _names(sparsities, pattern)]
    _refuse_existing(paths, force=force)

    from lottery_tickets.large_models import compute_weights_digest, load_model, resolve_model

    folder = resolve_model(model)
    digest = compute_weights_digest(folder)
    if saved and scores:
        check_drawn_from(session, model, digest, {scores: saved.metadata}, other_weights=other_weights)
    by_weights = saved is None and not chosen.scorer
    draw_from = partial(
        draw,
        criterion=chosen,
        sparsities=sparsities,
        spread=spread,
        include=include,
        exclude=exclude,
        progress=session.progress,
    )
    masks = _drawn_from_files(session, folder, draw_from) if by_weights and dtype is Dtype.auto else None
    if masks is None:
        where = chosen_device(device) if chosen.scorer and not saved else chosen_device("cpu")
        loaded_as = dtype.for_scoring(where) if chosen.scorer else dtype.type
        dense = load_model(folder, loaded_as, device=where, progress=session.progress)
        if saved is None and chosen.scorer:
            rehearse(dense, chosen, sparsities, spread, include=include, exclude=exclude)
            text = (
                None
                if calibration is None
                else Calibration(calibration, samples, context, batch_size, calibration_start or 0)
            )
            saved = score_model(session, dense, folder, chosen, text, computing, include=include, exclude=exclude)
        masks = draw_from(dense, saved.scores if saved else None)
    origin = {
        "base_model": model_name(model),
        "weights_digest": digest,
        "dtype": dtype.value,
        "criterion": chosen.name,
        **(saved.origin if saved else {}),
        **spread.described(chosen),
    }
    origin |= {key: json.dumps(names) for key, names in (("include", include), ("exclude", exclude)) if names}
    output.mkdir(parents=True, exist_ok=True)
    targets = sparsities or [_removed_by(pattern)]
    for path, one, ticket in zip(paths, targets, masks, strict=True):
        ticket.save(path, metadata={**origin, "target_sparsity": str(one)})
    data = {
        "model": model_name(model),
        "weights_digest": digest,
        "criterion": chosen.name,
        "spread": spread.label(chosen),
        "tickets": [
            _described(path, one, ticket) for path, one, ticket in zip(paths, targets, masks, strict=True)
        ],
    }
    return Report(data, lambda console: _show(console, data))


def _drawn_from_files(
    session: Session, folder: Path, draw_from: Callable[[Path, None], list[Mask]]
) -> list[Mask] | None:
    """Tickets drawn without loading the model; None where it is stored otherwise than it is loaded."""
    try:
        return draw_from(folder, None)
    except CheckpointError as error:
        session.note(f"note: loading the model: {error}")
        return None


def _check_usage(
    sparsities: Sequence[float],
    pattern: str | None,
    criterion: Criterion | None,
    scores: Path | None,
    calibration: Path | None,
) -> None:
    if not sparsities and pattern is None:
        raise typer.BadParameter("say how much to remove, or give --pattern", param_hint="--sparsity")
    if len(set(sparsities)) != len(sparsities):
        raise typer.BadParameter("the same sparsity is given twice", param_hint="--sparsity")
    if pattern is not None and len(sparsities) > 1:
        raise typer.BadParameter("a pattern has one sparsity, its own", param_hint="--sparsity")
    if scores is not None and (criterion is not None or calibration is not None):
        raise typer.BadParameter("saved scores have their criterion and their text", param_hint="--scores")
    ranking = criterion or CRITERIA["magnitude"]
    if ranking.needs_text and calibration is None:
        raise typer.BadParameter(f"{ranking.name} takes a text", param_hint="--calibration")
    if calibration is not None and not ranking.needs_text:
        raise typer.BadParameter(f"{ranking.name} takes no text", param_hint="--calibration")


def _names(sparsities: Sequence[float], pattern: str | None) -> list[str]:
    # A colon cannot stand in the names of files everywhere.
    return [pattern.replace(":", "of")] if pattern is not None else [str(one) for one in sparsities]


def _removed_by(pattern: str | None) -> float:
    kept, group = map(int, (pattern or "").split(":"))
    return 1 - kept / group


def _refuse_existing(paths: Sequence[Path], *, force: bool) -> None:
    existing = [str(path) for path in paths if path.exists()]
    if existing and not force:
        raise FileExistsError(f"{', '.join(existing)}: there already; --force replaces, -o names another folder.")


def _described(path: Path, target: float, ticket: Mask) -> dict[str, Any]:
    return {
        "path": str(path),
        "target_sparsity": target,
        "sparsity": ticket.sparsity,
        "numel": ticket.numel,
        "removed": ticket.numel - ticket.kept,
        "bytes": path.stat().st_size,
        "digest": ticket.digest(),
    }


def _show(console: Console, data: Mapping[str, Any]) -> None:
    table = new_table(title=f"Tickets from {data['model']}, weights {data['weights_digest'][:12]}")
    table.add_column("file", overflow="fold")
    for heading in ("sparsity", "removed", "of", "bytes"):
        table.add_column(heading, justify="right")
    table.add_column("digest")
    for ticket in data["tickets"]:
        table.add_row(
            ticket["path"],
            f"{ticket['sparsity']:.6f}",
            f"{ticket['removed']:,}",
            f"{ticket['numel']:,}",
            f"{ticket['bytes']:,}",
            ticket["digest"][:12],
        )
    console.print(table)
