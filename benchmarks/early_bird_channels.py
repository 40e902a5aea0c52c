"""Does it pay to train the early-bird ticket? Accuracy, seconds and arithmetic of whole trainings, over seeds.

    python benchmarks/early_bird_channels.py [--quick] [--seeds 3]

A small residual network with batch normalisation on Fashion-MNIST, by SGD with momentum and a cosine. Early-Bird
Train searches with an L1 penalty on the scales until the masks of 0.3, 0.5 and 0.7 of all channels have settled,
takes the channels out and trains what is left for the rest of the epochs. Beside it: dense training; training to
the end, taking the same share of channels out and training as long again (network slimming); and as many random
channels of each layer taken out when the ticket was. Costs count everything from the first step on: seconds of
training and checks, and multiplications and additions forward and backward.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from _common import benchmark_parser, keep
from lottery_tickets import Mask, compute_early_bird_tickets, create_structured_mask, extract_subnetwork
from lottery_tickets._statistics import ratio_interval
from lottery_tickets.training import DataOrder, Recipe, training
from lottery_tickets.vision import Images, TensorBatches, fashion_mnist, residual_cnn

SPARSITIES = (0.3, 0.5, 0.7)
BATCH_SIZE, RATE, MOMENTUM, DECAY, BN_L1 = 64, 0.05, 0.9, 5e-4, 1e-4


def cosine(steps: int, start: int, step: int) -> float:
    """Factor of the learning rate."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (start + step) / steps)))


class Bench:
    """Trainings on the same data, their accuracy and their cost."""

    def __init__(self, images: Images, epochs: int) -> None:
        self.images, self.epochs = images, epochs
        self.steps = math.ceil(len(images.train_labels) / BATCH_SIZE)
        self.total = self.steps * epochs

    def batches(self) -> TensorBatches:
        """The training data."""
        return TensorBatches(self.images.train_inputs, self.images.train_labels, BATCH_SIZE, shuffle=True)

    def schedule(self, start: int = 0) -> Any:
        """Of the learning rate, from a step on."""
        return partial(LambdaLR, lr_lambda=partial(cosine, self.total, start))

    def train(self, model: nn.Module, seed: int, start: int = 0, bn_l1: float = 0.0) -> float:
        """The steps from `start` to the end.

        Returns:
            Seconds.
        """
        recipe = Recipe(
            learning_rate=RATE,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            bn_l1=bn_l1,
            scheduler=self.schedule(start),
        )
        order = DataOrder(self.batches(), seed)
        began = time.perf_counter()
        with training(model):
            trainer = recipe.trainer(model, seed)
            for epoch in range(start // self.steps, self.epochs):
                skip = start % self.steps if epoch == start // self.steps else 0
                for batch in order.epoch(epoch, skip):
                    trainer.step(batch)
        return time.perf_counter() - began

    def accuracy(self, model: nn.Module) -> float:
        """Share of the test images that are told right."""
        model.eval()
        with torch.inference_mode():
            right = sum(
                int((model(inputs).argmax(1) == labels).sum())
                for inputs, labels in TensorBatches(self.images.test_inputs, self.images.test_labels, 1000)
            )
        return right / len(self.images.test_labels)

    def arithmetic(self, model: nn.Module, steps: int) -> float:
        """Multiplications and additions of so many steps."""
        inputs, labels = self.images.train_inputs[:BATCH_SIZE], self.images.train_labels[:BATCH_SIZE]
        probe = copy.deepcopy(model).train()
        with FlopCounterMode(display=False) as counter:
            nn.functional.cross_entropy(probe(inputs), labels).backward()
        return float(counter.get_total_flops()) * steps

    def seed(self, seed: int) -> dict[str, dict[str, float]]:
        """Every way of training, from the same initial weights."""
        torch.manual_seed(seed)
        initial = residual_cnn()
        dense = copy.deepcopy(initial)
        whole = self.arithmetic(dense, 1)
        found = {}
        seconds = self.train(dense, seed)
        found["dense"] = self.row(dense, seconds, whole * self.total)

        slimmed = copy.deepcopy(initial)
        seconds = self.train(slimmed, seed, bn_l1=BN_L1)
        for sparsity in SPARSITIES:
            mask = create_structured_mask(
                slimmed,
                sparsity,
                criterion="bn_scale",
                count="units",
                example_inputs=self.images.test_inputs[:2],
            )
            small = extract_subnetwork(slimmed, mask)
            again = self.train(small, seed + 1)
            cost = whole * self.total + self.arithmetic(small, self.total)
            found[f"train, prune, train again {sparsity}"] = self.row(small, seconds + again, cost)

        searched = copy.deepcopy(initial)
        began = time.perf_counter()
        results = compute_early_bird_tickets(
            searched,
            self.batches(),
            max_epochs=self.epochs,
            target_sparsity=list(SPARSITIES),
            check_every_steps=max(1, self.steps // 4),
            learning_rate=RATE,
            momentum=MOMENTUM,
            weight_decay=DECAY,
            max_grad_norm=None,
            scheduler=self.schedule(),
            structure="channel",
            bn_l1=BN_L1,
            seed=seed,
            progress=False,
        )
        seconds = time.perf_counter() - began
        stopped = results[0]["training"]["steps"] or 0
        for result in results:
            ticket, sparsity = result["final_mask"], result["target_sparsity"]
            for name, mask in (("early bird", ticket), ("random channels", Mask.random_like(ticket, seed))):
                small = extract_subnetwork(searched, mask)
                spent = self.train(small, seed, start=stopped)
                cost = whole * stopped + self.arithmetic(small, self.total - stopped)
                row = self.row(small, seconds + spent, cost)
                row |= {"settled": float(result["converged"]), "settled_at": stopped / self.steps}
                row["settled_step"] = float(result["convergence_step"] or self.total)
                found[f"{name} {sparsity}"] = row
        return found

    def row(self, model: nn.Module, seconds: float, cost: float) -> dict[str, float]:
        """What came of a training."""
        parameters = sum(one.numel() for one in model.parameters())
        return {
            "accuracy": self.accuracy(model),
            "seconds": seconds,
            "operations": cost,
            "parameters": float(parameters),
        }


def summary(runs: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Means over seeds, intervals of the accuracies, and costs over those of dense training of the same seed."""
    rows: dict[str, Any] = {}
    for name in runs[0]:
        accuracies = [run[name]["accuracy"] for run in runs]
        rows[name] = {
            "accuracy": float(np.mean(accuracies)),
            "accuracy_interval": list(ratio_interval(accuracies, [1.0] * len(runs), 0.95) or ()),
            "lost_to_dense": float(np.mean([run["dense"]["accuracy"] - run[name]["accuracy"] for run in runs])),
            "time_ratio": float(np.mean([run[name]["seconds"] / run["dense"]["seconds"] for run in runs])),
            "operations_ratio": float(
                np.mean([run[name]["operations"] / run["dense"]["operations"] for run in runs])
            ),
            "parameters": float(np.mean([run[name]["parameters"] for run in runs])),
        }
    return rows


def main() -> None:
    """Train, print, write."""
    parser = benchmark_parser(__doc__, "a thousand images, two epochs, two seeds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--train-images", type=int, default=10_000, help="How many of the 60,000.")
    given = parser.parse_args()
    count, epochs, seeds = (1000, 2, 2) if given.quick else (given.train_images, given.epochs, given.seeds)

    images = fashion_mnist()
    images = images._replace(train_inputs=images.train_inputs[:count], train_labels=images.train_labels[:count])
    bench = Bench(images, epochs)
    runs = []
    for seed in range(seeds):
        runs.append(bench.seed(seed))
        print(f"seed {seed}: dense {runs[-1]['dense']['accuracy']:.4f}", flush=True)
    rows = summary(runs)
    table = Table("training", "accuracy", "interval", "time", "operations", "parameters")
    for name, row in rows.items():
        low, high = row["accuracy_interval"]
        table.add_row(
            *(name, f"{row['accuracy']:.4f}", f"[{low:.4f}, {high:.4f}]"),
            *(f"x {row['time_ratio']:.2f}", f"x {row['operations_ratio']:.2f}", f"{row['parameters']:,.0f}"),
        )
    Console().print(table)
    results = {"train_images": count, "epochs": epochs, "seeds": seeds, "rows": rows, "runs": runs}
    print(keep("early_bird_channels", results, given))


if __name__ == "__main__":
    main()
