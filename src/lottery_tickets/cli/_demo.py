"""`demo`: tickets of a real language model, their perplexity beside the dense model's and chance's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app, program
from lottery_tickets.cli._arguments import chosen_device, model_name
from lottery_tickets.cli._shell import Report, Session, command, new_table, number, with_interval
from lottery_tickets.errors import MissingExtraError

if TYPE_CHECKING:
    from lottery_tickets.masks import Mask

CONTEXT = 512
# The opening of the text is known to the model by heart; the middle is not.
START = 2_000_000


@command(app, "demo", "lottery-tickets demo --output tickets", asks_memory=True)
def demo(
    session: Session,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the tickets.")] = Path("tickets"),
    sparsity: Annotated[
        list[float] | None, typer.Option("--sparsity", "-s", help="Fraction to remove. Default: 0.1, 0.3, 0.5.")
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of 512 tokens to evaluate on; more narrow the intervals.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of the random masks.")] = 0,
) -> Report:
    """Draw tickets from SmolLM2-135M and compare their perplexity with the dense model's and a random mask's.

    Needs what `make data` fetches; takes about two minutes on two cores. Tickets are written to the output
    folder, where those of an earlier demo are replaced.
    """
    import torch

    if find_spec("transformers") is None:
        raise MissingExtraError("transformers", "demo")
    from lottery_tickets._data import model_folder, text_file
    from lottery_tickets.cli._windows import text_windows
    from lottery_tickets.evaluation import compute_lottery_ticket_qualities
    from lottery_tickets.large_models import compute_weights_digest, load_model, load_tokenizer
    from lottery_tickets.magnitude_pruning import create_magnitude_mask
    from lottery_tickets.masks import Mask, prunable_parameters

    sparsities = sorted(set(sparsity or (0.1, 0.3, 0.5)))
    folder, text = model_folder(), text_file()
    model = load_model(folder, torch.float32, device=chosen_device("auto"), progress=session.progress)
    numel = sum(parameter.numel() for parameter in prunable_parameters(model).values())
    session.note(f"{model_name(str(folder))}: {numel:,} prunable weights, drawing {len(sparsities)} tickets")
    began = time.perf_counter()
    masks = create_magnitude_mask(model, sparsities, progress=session.progress)
    seconds = time.perf_counter() - began
    paths = _save(output, sparsities, masks, folder, compute_weights_digest(folder))
    models: dict[str, Mask] = {}
    for target, mask in zip(sparsities, masks, strict=True):
        models |= {f"ticket {target}": mask, f"random {target}": Mask.random_like(mask, seed)}
    batches = text_windows(load_tokenizer(folder), text, CONTEXT, count=windows, start=START)
    session.note(
        f"drawn in {seconds:.1f} s; evaluating {len(models) + 1} models on {windows} windows of {CONTEXT} tokens"
    )
    qualities = compute_lottery_ticket_qualities(model, models, batches, progress=session.progress)
    data = {
        "model": str(folder),
        "text": str(text),
        "windows": windows,
        "context": CONTEXT,
        "prunable_weights": numel,
        "seconds_drawing": seconds,
        "seed": seed,
        "dense": next(iter(qualities.values()))["baseline"],
        "tickets": [
            {
                "path": str(path),
                "target_sparsity": target,
                "bytes": path.stat().st_size,
                "ticket": qualities[f"ticket {target}"],
                "random": qualities[f"random {target}"],
            }
            for target, path in zip(sparsities, paths, strict=True)
        ],
    }
    return Report(data, lambda console: _show(console, data))


def _save(output: Path, sparsities: list[float], masks: list[Mask], folder: Path, digest: str) -> list[Path]:
    output.mkdir(parents=True, exist_ok=True)
    paths = []
    for target, mask in zip(sparsities, masks, strict=True):
        origin = {"base_model": folder.name, "weights_digest": digest, "criterion": "magnitude"}
        paths.append(output / f"magnitude-{target}.safetensors")
        mask.save(paths[-1], metadata={**origin, "scope": "global", "target_sparsity": str(target)})
    return paths


def _show(console: Console, data: Mapping[str, Any]) -> None:
    table = new_table(
        title=f"Perplexity of SmolLM2-135M on English text, {data['windows']} windows of {data['context']} tokens"
    )
    for heading in ("sparsity", "ticket", "random mask", "retention", "bytes"):
        table.add_column(heading, justify="right")
    dense = data["dense"]
    table.add_row("dense", with_interval(dense["perplexity"], dense["perplexity_interval"], 2), "", "1", "")
    for row in data["tickets"]:
        ticket, random = row["ticket"], row["random"]
        table.add_row(
            number(ticket["sparsity"], 3),
            with_interval(ticket["perplexity"], ticket["perplexity_interval"], 2),
            with_interval(random["perplexity"], random["perplexity_interval"], 2),
            with_interval(ticket["performance_retention"], ticket["retention_interval"], 3),
            f"{row['bytes']:,}",
        )
    console.print(table)
    beyond = max(row["bytes"] for row in data["tickets"]) - data["prunable_weights"] / 8
    console.print(
        "In brackets: 95% intervals over windows. Retention: dense loss / ticket loss. A random mask removes as "
        "many weights of each tensor as the ticket. A file holds one bit for each of N prunable weights: "
        f"N / 8 = {data['prunable_weights'] / 8:,.0f} bytes, and {beyond / 1024:.1f} KiB to say what they are."
    )
    first, last = data["tickets"][0]["path"], data["tickets"][-1]["path"]
    console.print("\nThe tickets are files; try")
    for line in (f"inspect {last}", f"overlap {first} {last}", f"apply {data['model']} {last} -o pruned"):
        console.print(f"  {program()} {line}", soft_wrap=True)
