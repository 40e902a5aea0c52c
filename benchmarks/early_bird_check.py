"""What a check costs: its time on a model of 100M weights against an epoch of 200 batches.

    python benchmarks/early_bird_check.py [--quick]

The model is an MLP of 100M weights on MNIST digits, as in the demo in batches of 64, trained by SGD in the
backward pass in float32. Of the epoch 40 batches are trained, by `compute_early_bird_tickets` with a check after
every 10, and its seconds are five times theirs; all seconds are its own, `seconds` and `check_seconds` of each
checkpoint. A check draws the mask, measures how many weights moved and what distance chance would give, and
compares with the masks that are kept. The first check, before training, has nothing to compare with and is left
out. The other criteria are looked at over a few batches. Bar: the median check takes at most 5% of the epoch.
"""

from __future__ import annotations

import csv
import gzip
import statistics
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from _common import benchmark_parser, keep
from lottery_tickets import prunable_parameters
from lottery_tickets._data import images_file
from lottery_tickets.early_bird import compute_early_bird_tickets

BATCH, BATCHES, TRAINED, CHECKS = 64, 200, 40, 4
LAYERS = (784, 8192, 9600, 1600, 10)
SPARSITY = 0.9
BAR = 0.05
# Criterion to a threshold that nothing meets, so that all checks are made.
CRITERIA = {"window": 1e-6, "queue": 1e-6, "rank_correlation": 1 - 1e-9}

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def net(layers: tuple[int, ...]) -> nn.Module:
    """An MLP with these widths."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for inputs, outputs in pairwise(layers):
        parts += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def digits(batches: int) -> Batches:
    """Batches of MNIST digits, gone round as often as needed."""
    with gzip.open(images_file(), "rt", newline="") as file:
        rows = torch.tensor([[int(cell) for cell in row] for row in csv.reader(file)])
    order = torch.arange(batches * BATCH) % len(rows)
    return [(part[:, :-1] / 255, part[:, -1].clone()) for part in rows[order].split(BATCH)]


def measure(layers: tuple[int, ...], batches: Batches, criterion: str, checks: int) -> tuple[list[float], float]:
    """Seconds of each check but the first, and of the training between them."""
    results = compute_early_bird_tickets(
        net(layers),
        batches,
        target_sparsity=SPARSITY,
        max_epochs=1,
        check_every_steps=len(batches) // checks,
        criterion=criterion,  # type: ignore[arg-type]
        convergence_threshold=CRITERIA[criterion],
        learning_rate=0.1,
        progress=False,
    )
    checkpoints = results["checkpoints"][1:]
    assert len(checkpoints) == checks
    return [check["check_seconds"] for check in checkpoints], sum(check["seconds"] for check in checkpoints)


def run(*, quick: bool) -> dict[str, Any]:
    """All figures."""
    layers = (784, 1024, 10) if quick else LAYERS
    batches = digits(20 if quick else TRAINED)
    numel = sum(weight.numel() for weight in prunable_parameters(net(layers)).values())
    measure(layers, batches[:2], "rank_correlation", 2)  # compiled and cached code does not count
    seconds: dict[str, list[float]] = {}
    seconds["window"], trained = measure(layers, batches, "window", CHECKS)
    epoch = trained / len(batches) * BATCHES
    for criterion in ("queue", "rank_correlation"):
        seconds[criterion], _ = measure(layers, batches[:4], criterion, CHECKS)
    return {
        "weights": numel,
        "layers": list(layers),
        "dtype": "float32",
        "sparsity": SPARSITY,
        "batch_size": BATCH,
        "batches": BATCHES,
        "trained_batches": len(batches),
        "epoch_seconds": epoch,
        "check_seconds": seconds,
        "median_check_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {name: statistics.median(values) / epoch for name, values in seconds.items()},
        "bar": BAR,
    }


def table(results: dict[str, Any]) -> Table:
    """The results beside the bar."""
    shown = Table(
        title=f"{results['weights']:,} weights; an epoch of {results['batches']} batches of "
        f"{results['batch_size']} takes {results['epoch_seconds']:.1f} s"
    )
    for heading in ("criterion", "median check", "share of the epoch", "bar"):
        shown.add_column(heading, justify="right")
    for name, seconds in results["median_check_seconds"].items():
        shown.add_row(name, f"{seconds:.3f} s", f"{results['ratios'][name]:.2%}", f"{BAR:.0%}")
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/early_bird_check.json."""
    given = benchmark_parser(__doc__, "a small model").parse_args()
    console = Console()
    torch.set_num_threads(2)
    results = run(quick=given.quick)
    console.print(table(results))
    console.print(keep("early_bird_check", results, given))


if __name__ == "__main__":
    main()
