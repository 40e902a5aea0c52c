"""Quality of a ticket whose model does not fit in memory: time, memory and bytes read, beside reading the file.

The checkpoint is that of `streaming.py`: the exact shapes of a Qwen2.5 model in bfloat16, of random numbers.
A ticket of sparsity 0.9 is drawn from its folder; then the dense model and the ticket are evaluated on 512 tokens,
block by block, in one pass over the files. Each figure comes from a process of its own; before each, what the
system has cached of the files is dropped. Time stands beside that of a plain sequential reader of the files.

    python benchmarks/quality_from_disk.py [--billions 1.5] [--folder DIR]

Without --billions it is 14, which takes 29.5 GB on disk, and writes benchmarks/results/quality_from_disk.json;
smaller ones print only.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import benchmark_parser, keep
from streaming import FULL, SHAPES, SPARSITY, make_checkpoint, measured

TOKENS = 512
READ = "read once"
QUALITY = "quality from disk"
ANONYMOUS_BAR = 6_000_000_000
FIGURES = ("seconds", "anonymous_before", "anonymous_peak", "bytes_read")


# --- What is measured, each in a process of its own ---


def draw(ticket: Path, folder: Path) -> Callable[[], object]:
    """The ticket, into a file."""
    from lottery_tickets import create_magnitude_mask

    return lambda: create_magnitude_mask(folder, SPARSITY, progress=False).save(ticket)


def read_once(folder: Path) -> Callable[[], object]:
    """All shards from beginning to end, into one buffer."""

    def work() -> None:
        buffer = bytearray(8 << 20)
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    return work


def quality(ticket: Path, folder: Path) -> Callable[[], object]:
    """Dense model and ticket on one window of tokens; the ticket and transformers are there beforehand."""
    import transformers

    from lottery_tickets import Mask, compute_lottery_ticket_quality

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        transformers.AutoModelForCausalLM.from_config(config)
    mask = Mask.load(ticket)
    tokens = torch.randint(config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def work() -> dict[str, Any]:
        found = compute_lottery_ticket_quality(folder, mask, {"input_ids": tokens}, progress=False)
        return {"loss": found["loss"], "dense_loss": found["baseline"]["loss"], "sparsity": found["sparsity"]}

    return work


# --- All of it ---


def benchmark(folder: Path, billions: float) -> dict[str, Any]:
    """All figures of one checkpoint."""
    with tempfile.TemporaryDirectory(prefix="quality-", dir="/var/tmp") as name:
        ticket = Path(name) / "ticket.safetensors"
        measured(partial(draw, ticket), folder)
        runs = {READ: measured(read_once, folder), QUALITY: measured(partial(quality, ticket), folder)}
        mask_bytes = ticket.stat().st_size
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    judged = runs[QUALITY]
    return {
        "billions": billions,
        "file_bytes": size,
        "tokens": TOKENS,
        "sparsity": judged["sparsity"],
        "loss": judged["loss"],
        "dense_loss": judged["dense_loss"],
        "mask_bytes": mask_bytes,
        "runs": {name: {key: run[key] for key in FIGURES} for name, run in runs.items()},
        "anonymous_peak": judged["anonymous_peak"],
        "anonymous_bar": ANONYMOUS_BAR,
        "read_ratio": judged["bytes_read"] / size,
        "time_ratio": judged["seconds"] / runs[READ]["seconds"],
    }


def table(results: Mapping[str, Any]) -> Table:
    """Times, memory and bytes."""
    shown = Table(title=f"{results['file_bytes'] / 1e9:.1f} GB, {results['tokens']} tokens, dense and one ticket")
    for heading in ("", "seconds", "times the file read", "peak of anonymous memory"):
        shown.add_column(heading, justify="left" if not heading else "right")
    for name, run in results["runs"].items():
        shown.add_row(
            name,
            f"{run['seconds']:.1f}",
            f"{run['bytes_read'] / results['file_bytes']:.2f}",
            f"{run['anonymous_peak'] / 1e9:,.2f} GB",
        )
    return shown


def main() -> None:
    """Make or find the checkpoint, run, print, and write benchmarks/results/quality_from_disk.json."""
    parser = benchmark_parser(__doc__, "the smallest of the models")
    parser.add_argument("--billions", type=float, choices=sorted(SHAPES), default=FULL)
    parser.add_argument(
        "--folder", type=Path, help="where the checkpoint is made or found, and stays; default: a temporary one"
    )
    given = parser.parse_args()
    billions = min(SHAPES) if given.quick else given.billions
    console = Console()
    home = given.folder or Path(tempfile.mkdtemp(prefix="quality-", dir="/var/tmp"))
    checkpoint = home / "checkpoint"
    if not checkpoint.is_dir():
        make_checkpoint(home / "unfinished", billions)
        (home / "unfinished").rename(checkpoint)
    results = benchmark(checkpoint, billions)
    console.print(table(results))
    console.print(
        f"peak of anonymous memory {results['anonymous_peak'] / 1e9:.2f} GB, at most {ANONYMOUS_BAR / 1e9:.0f}; "
        f"the file read {results['read_ratio']:.2f} times, in {results['time_ratio']:.1f} times the reader's time"
    )
    if given.quick or given.results or billions == FULL:
        console.print(keep("quality_from_disk", results, given))
    if given.folder is None:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
