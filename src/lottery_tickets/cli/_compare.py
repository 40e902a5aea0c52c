"""`compare`: criteria and spreads beside each other on a real model and a real text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ModelArgument,
    check_context,
    chosen_device,
    model_name,
)
from lottery_tickets.cli._calibration import BatchSizeOption, Excerpt, SamplesOption, kept_apart
from lottery_tickets.cli._computing import (
    CheckpointOption,
    ChunkSizeOption,
    ClipOption,
    Computing,
    RoundsOption,
    StoreName,
    StoreOption,
)
from lottery_tickets.cli._criteria import CRITERIA, HYBRIDS, Criterion, criterion_of
from lottery_tickets.cli._shell import Report, Session, command, new_table, number, with_interval
from lottery_tickets.cli._spreads import ALLOCATIONS, Remainder, RemainderOption, Scope, Spread
from lottery_tickets.cli._told import write_json

if TYPE_CHECKING:
    from lottery_tickets.cli._comparison import Row

MIB = 1 << 20


@command(
    app,
    "compare",
    "lottery-tickets compare ./my-model --criteria magnitude,wanda,fisher -s 0.3 -s 0.5 --text book.txt",
    "lottery-tickets compare ./my-model --criteria magnitude,wanda --scope layer --scope row -s 0.5 "
    "--pattern 2:4 --text book.txt -o comparison.json --plot comparison.svg",
    asks_memory=True,
)
def compare(
    session: Session,
    model: ModelArgument,
    text: Annotated[
        Path, typer.Option("--text", help="UTF-8 text to judge by; also to calibrate by, from another part.")
    ],
    criteria: Annotated[
        str, typer.Option(metavar="NAME,NAME...", help=f"What to rank by: {', '.join(CRITERIA)}. {HYBRIDS}")
    ] = "magnitude,wanda,fisher",
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", "-s", help="Fraction to remove, in [0, 1). Repeatable.")
    ] = None,
    scope: Annotated[
        list[Scope] | None,
        typer.Option(help="What is compared. Repeatable. Default: row for wanda, global for others."),
    ] = None,
    allocation: Annotated[
        list[str] | None, typer.Option(metavar=f"[{'|'.join(ALLOCATIONS)}]", help="As for mask. Repeatable.")
    ] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(metavar="N:M", help="Keep N of every M weights. Repeatable.")
    ] = None,
    pattern_remainder: RemainderOption = Remainder.error,
    context: Annotated[int, typer.Option(min=2, help="Tokens per window of the test text.")] = 512,
    max_windows: Annotated[int, typer.Option(min=1, help="Windows of the test text.")] = 8,
    start: Annotated[
        int | None, typer.Option(min=0, help="Character at which the test text begins. Default: the middle.")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text to compute scores from. Default: --text's file."),
    ] = None,
    calibration_start: Annotated[
        int, typer.Option(min=0, help="Character at which the calibration text begins.")
    ] = 0,
    samples: SamplesOption = 128,
    calibration_context: Annotated[
        int | None, typer.Option(min=2, help="Tokens per calibration sequence. Default: as --context.")
    ] = None,
    batch_size: BatchSizeOption = 8,
    confidence: Annotated[float, typer.Option(help="Coverage of the intervals, in (0, 1).")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="Of criteria that draw at random.")] = 0,
    store: StoreOption = StoreName.cpu,
    chunk_size: ChunkSizeOption = None,
    checkpoint_activations: CheckpointOption = False,
    gradient_clip: ClipOption = None,
    rounds: RoundsOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the results as JSON too.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Draw perplexity over sparsity; the suffix names the format (svg, png)."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> Report:
    """Compare criteria: the tickets that each draws, by their perplexity on the same windows of a text.

    Scores come from a calibration text and tickets are judged on a test text; where both are one file the earlier
    one ends where the later one begins. Seconds and memory are those of scoring and drawing.
    """
    chosen = _criteria(criteria)
    computing = Computing(seed, store.value, chunk_size, checkpoint_activations, gradient_clip, rounds)
    computing.check(chosen)
    if (scope or allocation) and pattern and not sparsity:
        raise typer.BadParameter("say how much a scope or an allocation removes", param_hint="--sparsity")
    sparsities = list(dict.fromkeys(sparsity or [])) or ([] if pattern else [0.5])
    spreads = _spreads(scope, allocation, pattern, pattern_remainder, also_plain=bool(sparsities))
    existing = [str(path) for path in (output, plot) if path and path.exists()]
    if existing and not force:
        raise FileExistsError(f"{', '.join(existing)}: there already; --force replaces.")
    if plot:
        from lottery_tickets.reports import check_format

        check_format(plot, "--plot")

    from lottery_tickets.cli._comparison import Comparison
    from lottery_tickets.cli._windows import character_count
    from lottery_tickets.large_models import compute_weights_digest, load_model, load_tokenizer, resolve_model

    folder = resolve_model(model)
    test = Excerpt(text, context, max_windows, character_count(text) // 2 if start is None else start)
    source = Excerpt(calibration or text, calibration_context or context, samples, calibration_start)
    source, test = kept_apart(source, test)
    tokenizer = load_tokenizer(folder)
    windows = test.windows(tokenizer)
    batches = source.batches(tokenizer, batch_size) if any(one.needs_text for one in chosen) else []
    where = chosen_device(device)
    dense = load_model(folder, dtype.for_scoring(where), device=where, progress=session.progress)
    check_context(dense, max(test.context, source.context if batches else 0))
    comparison = Comparison(
        dense,
        windows,
        batches,
        [(one, spread) for one in chosen for spread in spreads],
        sparsities,
        confidence,
        computing,
        session.progress,
        session.note,
    )
    comparison.rehearse()
    data: dict[str, Any] = {
        "model": model_name(model),
        "weights_digest": compute_weights_digest(folder),
        "dtype": str(next(dense.parameters()).dtype).removeprefix("torch."),
        "device": str(where),
        "text": str(text),
        "windows": len(windows),
        "context": context,
        "start": test.start,
        "calibration": {**_calibration_data(source), "batch_size": batch_size} if batches else None,
        "computing": asdict(computing),
        "confidence": confidence,
        "dense": None,
        "rows": [],
    }
    for row in comparison.rows():
        data["dense"] = row["quality"]["baseline"]
        data["rows"].append(row)
        if output:
            write_json(output, "compare", data)
    if plot:
        from lottery_tickets.cli._plot import write_plot

        write_plot(plot, data)
    return Report(data, lambda console: _show(console, data))


def _criteria(names: str) -> list[Criterion]:
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise typer.BadParameter("name at least one", param_hint="--criteria")
    return [criterion_of(name) for name in dict.fromkeys(listed)]


def _spreads(
    scopes: Sequence[Scope] | None,
    allocations: Sequence[str] | None,
    patterns: Sequence[str] | None,
    remainder: Remainder,
    *,
    also_plain: bool,
) -> list[Spread]:
    """What stands behind the options; where none says how sparsities are spread, the criterion's own way."""
    for one in allocations or []:
        if one not in ALLOCATIONS:
            raise typer.BadParameter(f"{one!r} is not one of {', '.join(ALLOCATIONS)}", param_hint="--allocation")
    spreads = [Spread(scope=one.value) for one in scopes or []]
    spreads += [Spread(allocation=one) for one in allocations or []]
    if not spreads and also_plain:
        spreads = [Spread()]
    return spreads + [Spread(pattern=one, pattern_remainder=remainder.value) for one in patterns or []]


def _calibration_data(source: Excerpt) -> dict[str, Any]:
    return {
        "text": str(source.path),
        "start": source.start,
        "samples": source.count,
        "context": source.context,
    }


def _show(console: Console, data: Mapping[str, Any]) -> None:
    table = new_table(
        title=f"{data['model']} ({data['dtype']}) on {Path(data['text']).name}: {data['windows']} windows of "
        f"{data['context']} tokens from character {data['start']:,}"
    )
    table.add_column("criterion")
    table.add_column("spread")
    for heading in ("sparsity", "perplexity", "retention", "seconds", "peak memory"):
        table.add_column(heading, justify="right")
    dense = data["dense"]
    table.add_row(
        "dense", "", "0", with_interval(dense["perplexity"], dense["perplexity_interval"], 2), "1", "", ""
    )
    for row in data["rows"]:
        quality = row["quality"]
        table.add_row(
            row["criterion"],
            row["spread"],
            number(quality["sparsity"], 3),
            with_interval(quality["perplexity"], quality["perplexity_interval"], 2),
            with_interval(quality["performance_retention"], quality["retention_interval"], 3),
            number(row["seconds_scoring"] + row["seconds_drawing"], 1),
            _memory(row),
        )
    console.print(table)
    calibration = data["calibration"]
    if calibration:
        console.print(
            f"Scores from {calibration['samples']} sequences of {calibration['context']} tokens of "
            f"{Path(calibration['text']).name}, from character {calibration['start']:,}."
        )
    console.print(
        f"In brackets: {data['confidence']:.0%} intervals over windows. Retention: dense loss / ticket loss. "
        "Seconds: scoring, which serves all rows of a criterion, and drawing. Peak memory: the most that the "
        f"{_measured(data)} rose above the loaded model meanwhile."
    )


def _memory(row: Row) -> str:
    peak = row["peak_bytes"] if row["peak_device_bytes"] is None else row["peak_device_bytes"]
    return "-" if peak is None else f"{peak / MIB:,.0f} MiB"


def _measured(data: Mapping[str, Any]) -> str:
    on_device = data["rows"][0]["peak_device_bytes"] is not None
    return "accelerator's memory held by torch" if on_device else "resident memory of the process"
