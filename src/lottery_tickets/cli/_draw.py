"""`mask`: draw tickets from a checkpoint."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import Dtype, DtypeOption, ModelArgument, model_name
from lottery_tickets.cli._shell import Report, Session, command, new_table

if TYPE_CHECKING:
    from lottery_tickets.masks import Mask


class Scope(str, Enum):
    """One threshold for all tensors together, or one for each."""

    every = "global"
    layer = "layer"


@command(
    app,
    "mask",
    "lottery-tickets mask HuggingFaceTB/SmolLM2-135M --sparsity 0.5 --sparsity 0.9 -o tickets",
    "lottery-tickets mask ./my-model --sparsity 0.7 --scope layer --exclude '*.down_proj.weight' -o tickets",
)
def mask(
    session: Session,
    model: ModelArgument,
    sparsity: Annotated[
        list[float],
        typer.Option("--sparsity", "-s", help="Fraction to remove, in [0, 1); give it once per ticket."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tickets; made if missing.")],
    scope: Annotated[Scope, typer.Option(help="One threshold for all tensors, or one for each.")] = Scope.every,
    min_density: Annotated[
        float | None, typer.Option(help="Every tensor keeps at least this share; the total stays exact.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(help="Prune parameters of this name too; * matches any text. Repeatable.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Leave parameters of this name whole. Repeatable.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    force: Annotated[bool, typer.Option("--force", help="Replace tickets that exist.")] = False,
) -> Report:
    """Draw magnitude tickets from a model: one file per sparsity, all from one counting of the weights.

    Exactly round(sparsity * N) of the N prunable weights are removed, the smallest by magnitude. The files are
    called magnitude-SPARSITY.safetensors, and say which weights they were drawn from.
    """
    if len(set(sparsity)) != len(sparsity):
        raise typer.BadParameter("the same sparsity is given twice", param_hint="--sparsity")
    paths = [output / f"magnitude-{one}.safetensors" for one in sparsity]
    _refuse_existing(paths, force=force)

    from lottery_tickets.large_models import compute_weights_digest, load_model, resolve_model
    from lottery_tickets.magnitude_pruning import create_magnitude_mask

    folder = resolve_model(model)
    digest = compute_weights_digest(folder)
    masks = create_magnitude_mask(
        load_model(folder, dtype.torch, progress=session.progress),
        sparsity,
        scope="global" if scope is Scope.every else "layer",
        include=include,
        exclude=exclude,
        min_density=min_density,
        progress=session.progress,
    )
    origin = {
        "base_model": model_name(model),
        "weights_digest": digest,
        "criterion": "magnitude",
        "scope": scope.value,
        "dtype": dtype.value,
    }
    choices = {"min_density": min_density, "include": include, "exclude": exclude}
    origin |= {key: json.dumps(choice) for key, choice in choices.items() if choice}
    output.mkdir(parents=True, exist_ok=True)
    for path, one, ticket in zip(paths, sparsity, masks, strict=True):
        ticket.save(path, metadata={**origin, "target_sparsity": str(one)})
    data = {
        "model": model_name(model),
        "weights_digest": digest,
        "tickets": [
            _described(path, one, ticket) for path, one, ticket in zip(paths, sparsity, masks, strict=True)
        ],
    }
    return Report(data, lambda console: _show(console, data))


def _refuse_existing(paths: list[Path], *, force: bool) -> None:
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


def _show(console: Console, data: dict[str, Any]) -> None:
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
