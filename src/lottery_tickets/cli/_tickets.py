"""`inspect` and `apply`: what a ticket file says, and a checkpoint with it applied."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import ModelArgument, OtherWeightsOption, TicketArgument, check_weights
from lottery_tickets.cli._shell import Report, Session, command, new_table


@command(
    app,
    "inspect",
    "lottery-tickets inspect tickets/magnitude-0.5.safetensors",
    "lottery-tickets inspect ticket.safetensors --model tuned/checkpoint-300",
)
def inspect(
    session: Session,
    ticket: TicketArgument,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder or hub id: count its pruned weights that are not zero."),
    ] = None,
) -> Report:
    """Show what a ticket says of its origin, and how much it removes from each tensor.

    Every byte of the file is checked against its digest. With --model the exit code is 1 where a pruned weight is
    not zero; weights are read from disk, and the model is not loaded.
    """
    from lottery_tickets.inspection import validate_pruning_correctness
    from lottery_tickets.masks import Mask, readable_metadata

    mask = Mask.load(ticket)
    found = None if model is None else validate_pruning_correctness(model, mask)
    kept, sparsity = mask.layer_kept(), mask.layer_sparsity()
    data: dict[str, Any] = {
        "path": str(ticket),
        "bytes": ticket.stat().st_size,
        "digest": mask.digest(),
        "numel": mask.numel,
        "kept": mask.kept,
        "sparsity": mask.sparsity,
        "metadata": readable_metadata(mask.metadata),
        "layers": {
            name: {
                "shape": list(shape),
                "numel": shape.numel(),
                "kept": kept[name],
                "sparsity": sparsity[name],
                "not_zero": found and found["tensors"][name]["not_zero"],
            }
            for name, shape in mask.shapes.items()
        },
        "model": found
        and {
            "name": model,
            "valid": found["valid"],
            "not_zero": sum(check["not_zero"] for check in found["tensors"].values()),
            "problems": found["problems"],
        },
    }
    failed = found is not None and not found["valid"]
    return Report(data, lambda console: _show_ticket(console, data), failed)


@command(app, "apply", "lottery-tickets apply ./my-model tickets/magnitude-0.5.safetensors -o ./my-model-pruned")
def apply(
    session: Session,
    model: ModelArgument,
    ticket: TicketArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make; it must not exist.")],
    other_weights: OtherWeightsOption = False,
) -> Report:
    """Write a pruned copy of a checkpoint, shard by shard: pruned weights are zero, all else is as it was.

    The copy keeps data types, shards, configuration and tokenizer, and loads with from_pretrained. Weights that
    MODEL holds in other formats as well are left out.
    """
    from lottery_tickets.large_models import compute_weights_digest, prune_checkpoint, resolve_model
    from lottery_tickets.masks import Mask

    mask = Mask.load(ticket)
    folder = resolve_model(model)
    if "weights_digest" in mask.metadata:
        digest = compute_weights_digest(folder)
        check_weights(session, model, digest, {ticket: mask}, other_weights=other_weights)
    session.resume = "the same command goes on with the weight files that are missing"
    result = prune_checkpoint(folder, mask, output, progress=session.progress)
    data = {"model": model, "ticket": str(ticket), **result}
    return Report(data, lambda console: _show_pruned(console, data))


def _show_ticket(console: Console, data: dict[str, Any]) -> None:
    removed = data["numel"] - data["kept"]
    console.print(
        f"{data['path']}, {data['bytes']:,} bytes: removes {removed:,} of {data['numel']:,} weights, "
        f"sparsity {data['sparsity']:.6f}",
        soft_wrap=True,
    )
    for key, text in {"digest": data["digest"], **data["metadata"]}.items():
        console.print(f"  {key}: {text}", soft_wrap=True)
    table = new_table("tensor", "shape")
    for heading in ("weights", "kept", "sparsity"):
        table.add_column(heading, justify="right")
    for name, layer in data["layers"].items():
        shape = " x ".join(map(str, layer["shape"]))
        table.add_row(name, shape, f"{layer['numel']:,}", f"{layer['kept']:,}", f"{layer['sparsity']:.4f}")
    console.print(table)
    if data["model"] is not None:
        _show_check(console, data["model"], removed)


def _show_check(console: Console, check: dict[str, Any], removed: int) -> None:
    for problem in check["problems"]:
        console.print(f"  {problem}", soft_wrap=True)
    wrong = f"{check['not_zero']:,} of {removed:,} pruned weights are not zero"
    console.print(f"{check['name']}: {wrong}{'' if check['valid'] else '; not pruned as the ticket says'}.")


def _show_pruned(console: Console, data: dict[str, Any]) -> None:
    shards = len(data["shards"])
    console.print(
        f"{data['output']}: {data['weights_pruned']:,} weights are zero, in {data['tensors']} tensors, "
        f"{shards} weight file{'s' if shards > 1 else ''}.",
        markup=False,
    )
    if data["left_out"]:
        console.print(f"Left out, as other weights or pickles: {', '.join(data['left_out'])}")
    console.print(f"Load it with AutoModelForCausalLM.from_pretrained({data['output']!r}).")
