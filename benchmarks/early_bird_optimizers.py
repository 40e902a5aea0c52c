"""Is an early-bird ticket independent of the optimizer, as is often claimed?

    python benchmarks/early_bird_optimizers.py [--quick] [--data mnist|fashion-mnist] [--seeds N]

For each network and seed, SGD, SGD with momentum and AdamW start from the same initial weights, see the same
batches in the same order, and each draws its ticket when its mask has settled. Tickets are compared pair by pair:
Dice overlap, and its excess over chance as a share of what chance leaves, (overlap - chance) / (1 - chance),
which is 0 for independent masks of the same layer densities and 1 for equal ones. Two things to hold it against:
the same optimizer with the data in another order, and the mask of the initial weights, which all three start from.
Then every ticket, the dense network and random masks of the tickets' layer densities are trained from the initial
weights by one recipe, and tested.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from _common import benchmark_parser, keep
from lottery_tickets import Mask, compute_ticket_overlap, create_magnitude_mask
from lottery_tickets._controls import train_side_by_side
from lottery_tickets.early_bird import compute_early_bird_tickets
from lottery_tickets.training import restore_tensors, tensors_of
from lottery_tickets.vision import DATASETS, NETWORKS

SPARSITY = 0.5
BATCH_SIZE = 64
MAX_EPOCHS = 30
TRAINING_EPOCHS = 5
ELSEWHERE = 1000  # added to a seed for another order of the data
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.1},
    "sgd, momentum 0.9": {"optimizer": "sgd", "learning_rate": 0.02, "momentum": 0.9},
    "adamw": {"optimizer": "adamw", "learning_rate": 1e-3},
}
RECIPE = {"learning_rate": 0.02, "momentum": 0.9}


def corrected(first: Mask, second: Mask) -> dict[str, float]:
    """Dice overlap, what chance gives, and the excess as a share of what chance leaves."""
    found = compute_ticket_overlap(first, second, "dice", strict=True)
    overlap, chance = found["overall_overlap"], found["expected_by_chance"]
    return {"dice": overlap, "by_chance": chance, "corrected": (overlap - chance) / (1 - chance)}


def one_start(network: str, data: str, seed: int, console: Console) -> dict[str, Any]:
    """All optimizers from one set of initial weights."""
    torch.manual_seed(seed)
    model, images = NETWORKS[network](), DATASETS[data]()
    initial = {name: one.clone() for name, one in tensors_of(model).items()}
    train = DataLoader(TensorDataset(images.train_inputs, images.train_labels), BATCH_SIZE, shuffle=True)
    test = DataLoader(TensorDataset(images.test_inputs, images.test_labels), 1000)
    start = create_magnitude_mask(model, SPARSITY, progress=False)
    found: dict[str, Mapping[str, Any]] = {}
    for label, options in OPTIMIZERS.items():
        for order, order_seed in (("", seed), (", other order", seed + ELSEWHERE)):
            restore_tensors(model, initial)
            found[label + order] = compute_early_bird_tickets(
                model,
                train,
                max_epochs=MAX_EPOCHS,
                target_sparsity=SPARSITY,
                max_grad_norm=None,
                seed=order_seed,
                progress=False,
                **options,
            )
            last = found[label + order]["checkpoints"][-1]
            console.print(
                network, seed, label + order, found[label + order]["convergence_epoch"], last["distances"]
            )
    tickets = {label: found[label]["final_mask"] for label in OPTIMIZERS}
    masks: dict[str, Mask | None] = {"dense": None, "initial magnitudes": start, **tickets}
    masks |= {f"random as {label}": Mask.random_like(ticket, seed) for label, ticket in tickets.items()}
    trained = train_side_by_side(
        model, initial, masks, train, test, epochs=TRAINING_EPOCHS, seed=seed, progress=False, **RECIPE
    )
    return {
        "seed": seed,
        "birds": {
            label: {
                "converged": one["converged"],
                "convergence_epoch": one["convergence_epoch"],
                "null_distance": one["null_distance"],
                "distances": [look["distances"][-1] if look["distances"] else None for look in one["checkpoints"]],
            }
            for label, one in found.items()
        },
        "between_optimizers": {
            f"{a} / {b}": corrected(tickets[a], tickets[b]) for a, b in combinations(OPTIMIZERS, 2)
        },
        "between_orders": {
            label: corrected(ticket, found[f"{label}, other order"]["final_mask"])
            for label, ticket in tickets.items()
        },
        "with_initial": {label: corrected(ticket, start) for label, ticket in tickets.items()},
        "trained": trained,
    }


def measure(networks: Sequence[str], data: str, seeds: int, console: Console) -> dict[str, Any]:
    """All figures of this benchmark."""
    starts = {network: [one_start(network, data, seed, console) for seed in range(seeds)] for network in networks}
    return {
        "data": data,
        "sparsity": SPARSITY,
        "batch_size": BATCH_SIZE,
        "max_epochs": MAX_EPOCHS,
        "optimizers": OPTIMIZERS,
        "recipe": {**RECIPE, "epochs": TRAINING_EPOCHS},
        "starts": starts,
        "summary": {network: summary(found) for network, found in starts.items()},
    }


def summary(starts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, with their standard errors."""
    told = {
        part: {
            label: mean_and_error([start[part][label]["corrected"] for start in starts])
            for label in starts[0][part]
        }
        for part in ("between_optimizers", "between_orders", "with_initial")
    }
    trained = {
        label: mean_and_error([start["trained"][label]["accuracy"] for start in starts])
        for label in starts[0]["trained"]
    }
    epochs = {label: [start["birds"][label]["convergence_epoch"] for start in starts] for label in OPTIMIZERS}
    return {**told, "accuracy": trained, "convergence_epochs": epochs}


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its standard error, None for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def table(results: Mapping[str, Any]) -> Table:
    """Overlaps and accuracies by network."""
    shown = Table(title=f"Early-bird tickets of sparsity {results['sparsity']} on {results['data']}")
    shown.add_column("")
    networks = results["summary"]
    for network in networks:
        shown.add_column(network, justify="right")
    first = next(iter(networks.values()))
    for part in ("between_optimizers", "between_orders", "with_initial", "accuracy"):
        shown.add_section()
        for label in first[part]:
            cells = [f"{one[part][label]['mean']:.4f}" for one in networks.values()]
            shown.add_row(f"{part.replace('_', ' ')}: {label}", *cells)
    shown.add_section()
    for label in first["convergence_epochs"]:
        cells = [", ".join(map(str, one["convergence_epochs"][label])) for one in networks.values()]
        shown.add_row(f"settled at epoch: {label}", *cells)
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/early_bird_optimizers.json."""
    parser = benchmark_parser(__doc__, "one network, one seed")
    parser.add_argument("--data", choices=list(DATASETS), default="mnist")
    parser.add_argument("--seeds", type=int, default=3)
    chosen = parser.parse_args()
    console = Console()
    networks, seeds = (list(NETWORKS)[:1], 1) if chosen.quick else (list(NETWORKS), chosen.seeds)
    results = measure(networks, chosen.data, seeds, console)
    console.print(table(results))
    console.print(keep("early_bird_optimizers", results, chosen))


if __name__ == "__main__":
    main()
