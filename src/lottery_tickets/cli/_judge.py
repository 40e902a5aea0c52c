"""`evaluate` and `overlap`: how good tickets are, and how far two of them agree."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import (
    DeviceOption,
    Dtype,
    DtypeOption,
    FromDiskOption,
    HiddenStatesName,
    HiddenStatesOption,
    ModelArgument,
    OtherWeightsOption,
    check_context,
    check_from_disk,
    check_weights,
    chosen_device,
    computing_type,
    model_name,
)
from lottery_tickets.cli._shell import Report, Session, command, new_table, number, with_interval


class Method(str, Enum):
    """How two sets of kept weights are compared."""

    jaccard = "jaccard"
    dice = "dice"
    overlap = "overlap"


@command(
    app,
    "evaluate",
    "lottery-tickets evaluate ./my-model tickets/magnitude-0.5.safetensors --text book.txt --context 512",
    "lottery-tickets evaluate ./my-model tickets/*.safetensors --text book.txt --max-windows 20 --json",
    "lottery-tickets evaluate ./large-model tickets/magnitude-0.9.safetensors --text book.txt --from-disk",
    asks_memory=True,
)
def evaluate(
    session: Session,
    model: ModelArgument,
    tickets: Annotated[
        list[Path], typer.Argument(metavar="TICKET...", help="Ticket files, compared in one pass.")
    ],
    text: Annotated[Path, typer.Option("--text", help="UTF-8 text that the model has not seen.")],
    context: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    max_windows: Annotated[int | None, typer.Option(min=1, help="Stop after so many windows.")] = None,
    start: Annotated[int, typer.Option(min=0, help="Characters of the text to skip at its beginning.")] = 0,
    confidence: Annotated[float, typer.Option(help="Coverage of the intervals, in (0, 1).")] = 0.95,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    from_disk: FromDiskOption = False,
    hidden_states: HiddenStatesOption = HiddenStatesName.memory,
    other_weights: OtherWeightsOption = False,
) -> Report:
    """Measure the perplexity of tickets and of the dense model on the same windows of a text.

    The text is cut into windows that do not overlap; losses are taken in float32 and summed in float64, every
    token weighing the same. Intervals are over windows, so they need two windows at least. Retention is dense
    loss over ticket loss: 1 is as good as dense.
    """
    if len(set(tickets)) != len(tickets):
        raise typer.BadParameter("the same ticket is given twice", param_hint="TICKET...")
    if from_disk:
        check_from_disk(device)
    elif hidden_states is HiddenStatesName.disk:
        raise typer.BadParameter("goes with --from-disk", param_hint="--hidden-states")

    from lottery_tickets.cli._windows import text_windows
    from lottery_tickets.evaluation import compute_lottery_ticket_qualities
    from lottery_tickets.large_models import compute_weights_digest, load_model, load_tokenizer, resolve_model
    from lottery_tickets.masks import Mask

    masks = {path: Mask.load(path) for path in tickets}
    folder = resolve_model(model)
    digest = compute_weights_digest(folder)
    check_weights(session, model, digest, masks, other_weights=other_weights)
    windows = text_windows(load_tokenizer(folder), text, context, count=max_windows, start=start)
    check_context(folder, context)
    subject: Any = folder
    options: dict[str, Any] = {"dtype": dtype.type, "hidden_states": hidden_states.value}
    if not from_disk:
        subject = load_model(folder, dtype.type, device=chosen_device(device), progress=session.progress)
        options = {}
    session.note(f"evaluating {len(masks) + 1} models on {len(windows)} windows of {context} tokens")
    qualities = compute_lottery_ticket_qualities(
        subject,
        {str(path): mask for path, mask in masks.items()},
        windows,
        confidence=confidence,
        progress=session.progress,
        **options,
    )
    data = {
        "model": model_name(model),
        "weights_digest": digest,
        "text": str(text),
        "context": context,
        "windows": len(windows),
        "dtype": computing_type(subject, dtype),
        "baseline": next(iter(qualities.values()))["baseline"],
        "tickets": qualities,
    }
    return Report(data, lambda console: _show_qualities(console, data))


@command(
    app,
    "overlap",
    "lottery-tickets overlap tickets/magnitude-0.3.safetensors tickets/magnitude-0.5.safetensors --method dice",
)
def overlap(
    session: Session,
    first: Annotated[Path, typer.Argument(metavar="A", help="A ticket file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    method: Annotated[Method, typer.Option(help="How the kept weights are compared.")] = Method.jaccard,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse tickets that do not name the same tensors.")
    ] = False,
) -> Report:
    """Measure how far two tickets keep the same weights, beside what chance alone would give.

    jaccard is intersection over union, dice twice the intersection over the sum of both, overlap the
    intersection over the smaller one.
    """
    from lottery_tickets.masks import Mask
    from lottery_tickets.overlap import compute_ticket_overlap

    found = compute_ticket_overlap(Mask.load(first), Mask.load(second), method.value, strict=strict)
    result = {"first": str(first), "second": str(second), **found}
    return Report(result, lambda console: _show_overlap(console, result))


def _show_qualities(console: Console, data: Mapping[str, Any]) -> None:
    table = new_table(
        title=f"{data['model']} ({data['dtype']}) on {Path(data['text']).name}: {data['windows']} windows of "
        f"{data['context']} tokens"
    )
    table.add_column("ticket", overflow="fold")
    for heading in ("sparsity", "perplexity", "retention"):
        table.add_column(heading, justify="right")
    baseline = data["baseline"]
    table.add_row("dense", "0", with_interval(baseline["perplexity"], baseline["perplexity_interval"], 2), "1")
    for name, quality in data["tickets"].items():
        table.add_row(
            name,
            number(quality["sparsity"], 3),
            with_interval(quality["perplexity"], quality["perplexity_interval"], 2),
            with_interval(quality["performance_retention"], quality["retention_interval"], 3),
        )
    console.print(table)
    confidence = next(iter(data["tickets"].values()))["confidence"]
    console.print(f"In brackets: {confidence:.0%} intervals over windows. Retention: dense loss / ticket loss.")


def _show_overlap(console: Console, result: Mapping[str, Any]) -> None:
    summary = result["summary"]
    console.print(f"{result['method']} {result['overall_overlap']:.6f}")
    console.print(
        f"by chance {result['expected_by_chance']:.6f}, excess {result['excess']:+.6f}, "
        f"z-score {number(result['z_score'], 1)}"
    )
    console.print(
        f"{summary['total_intersection']:,} weights are kept by both, {summary['total_union']:,} by either; "
        f"sparsity {summary['sparsity_mask1']:.6f} and {summary['sparsity_mask2']:.6f}"
    )
    for warning in result["warnings"]:
        console.print(f"warning: {warning}")
    table = new_table("tensor")
    table.add_column(result["method"], justify="right")
    for name, value in result["layer_overlaps"].items():
        table.add_row(name, f"{value:.4f}")
    console.print(table)
