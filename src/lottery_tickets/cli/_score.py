"""`score`: importance scores of a checkpoint, kept in files that `mask` draws from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._arguments import (
    DeviceOption,
    Dtype,
    DtypeOption,
    ExcludeOption,
    FromDiskOption,
    IncludeOption,
    ModelArgument,
    check_from_disk,
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
from lottery_tickets.cli._criteria import Criterion, criterion_option
from lottery_tickets.cli._scoring import Calibration, Scored, score_into
from lottery_tickets.cli._shell import Report, Session, command, new_table


@command(
    app,
    "score",
    "lottery-tickets score ./my-model --criterion fisher --data book.txt -o scores",
    "lottery-tickets score ./my-model --criterion taylor --criterion wanda --data book.txt --samples 32 -o scores",
    "lottery-tickets score ./large-model --criterion fisher --data book.txt --store disk --checkpoint-activations "
    "--batch-size 1 -o scores",
    asks_memory=True,
)
def score(
    session: Session,
    model: ModelArgument,
    criterion: Annotated[list[Criterion], criterion_option("What to rank weights by. Repeatable.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the scores; made if missing.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="FILE", help="UTF-8 text that scores are computed from.")
    ] = None,
    samples: SamplesOption = 128,
    context: Annotated[int, typer.Option(min=2, help="Tokens per sequence.")] = 512,
    start: Annotated[int, typer.Option(min=0, help="Characters of the text to skip at its beginning.")] = 0,
    batch_size: BatchSizeOption = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of criteria that draw at random.")] = 0,
    store: StoreOption = StoreName.cpu,
    chunk_size: ChunkSizeOption = None,
    checkpoint_activations: CheckpointOption = False,
    gradient_clip: ClipOption = None,
    rounds: RoundsOption = None,
    include: IncludeOption = None,
    exclude: ExcludeOption = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
    from_disk: FromDiskOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace scores that exist.")] = False,
) -> Report:
    """Compute importance scores of a model's prunable weights: a file for each criterion, four bytes a weight.

    The files are called CRITERION.safetensors and say which weights and which text they come from; 'mask --scores'
    draws tickets from them, any number, without the model going through the text again. With '--store disk' sums
    over gradients lie in the file itself, so that scores need not fit in memory; with '--from-disk', which is for
    wanda, neither need the model.
    """
    chosen = list(dict.fromkeys(criterion))
    if from_disk:
        check_from_disk(device)
    computing = Computing(seed, store.value, chunk_size, checkpoint_activations, gradient_clip, rounds, from_disk)
    computing.check(chosen)
    for one in chosen:
        if one.scorer is None:
            raise typer.BadParameter(f"{one.name} ranks the weights as they are", param_hint="--criterion")
        if one.needs_text and data is None:
            raise typer.BadParameter(f"{one.name} takes a text", param_hint="--data")
    paths = {one.name: output / f"{one.name}.safetensors" for one in chosen}
    existing = [str(path) for path in paths.values() if path.exists()]
    if existing and not force:
        raise FileExistsError(f"{', '.join(existing)}: there already; --force replaces, -o names another folder.")

    from lottery_tickets.large_models import compute_weights_digest, load_model, resolve_model

    folder = resolve_model(model)
    origin = {"base_model": model_name(model), "weights_digest": compute_weights_digest(folder)}
    where = chosen_device("cpu" if from_disk else device)
    kind = dtype.for_scoring(where)
    computing = replace(computing, dtype=kind)
    subject = folder if from_disk else load_model(folder, kind, device=where, progress=session.progress)
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for one in chosen:
        text = Calibration(data, samples, context, batch_size, start) if data and one.needs_text else None
        scored = score_into(
            *(paths[one.name], origin, session, subject, folder, one, text, computing),
            include=include,
            exclude=exclude,
        )
        written.append(_described(paths[one.name], scored))
    report = {**origin, "scores": written}
    return Report(report, lambda console: _show(console, report))


def _described(path: Path, scored: Scored) -> dict[str, Any]:
    import torch

    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "criterion": scored.criterion.name,
        "numel": sum(tensor.numel() for tensor in scored.scores.values()),
        "metadata": dict(scored.metadata),
        "layers": {
            name: {"mean": float(tensor.mean(dtype=torch.float64)), "largest": float(tensor.max())}
            for name, tensor in scored.scores.items()
        },
    }


def _show(console: Console, data: Mapping[str, Any]) -> None:
    table = new_table(title=f"Scores of {data['base_model']}, weights {data['weights_digest'][:12]}")
    table.add_column("file", overflow="fold")
    for heading in ("weights", "samples", "bytes"):
        table.add_column(heading, justify="right")
    for one in data["scores"]:
        samples = one["metadata"].get("samples", "-")
        table.add_row(one["path"], f"{one['numel']:,}", samples, f"{one['bytes']:,}")
    console.print(table)
