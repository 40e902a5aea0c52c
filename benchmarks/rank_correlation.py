"""How far rank correlation by 256 buckets is from Spearman's of the magnitudes, and what a check costs.

Real weights: the layers of SmolLM2-135M beside themselves with noise and in another data type, and LeNet-300-100
trained on MNIST digits from one epoch to the next. scipy sorts all magnitudes for the exact figure. Then each part
of an early-bird check is timed on a hundred million weights, the unit being one parallel read pass over them.

    python benchmarks/rank_correlation.py [--quick]
"""

from __future__ import annotations

import csv
import gzip
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

from _common import benchmark_parser, keep, medians
from lottery_tickets import create_magnitude_mask, prunable_parameters
from lottery_tickets._data import images_file, model_folder
from lottery_tickets.detection import EarlyBirdDetector, MagnitudeRanks, MovementProbe

NOISE = (0.01, 0.1, 1.0)
EPOCHS = 3
SPARSITY = 0.5
CHUNK = 1 << 20

Weights = Mapping[str, torch.Tensor]


def main() -> None:
    given = benchmark_parser(__doc__, "fewer weights").parse_args()
    quick = given.quick
    torch.set_num_threads(2)
    results = {
        "agreement": [compared(*case) for case in cases(layers=1 if quick else 3)],
        "check": cost(tensors=10 if quick else 100, rounds=3 if quick else 7),
    }
    show(results)
    print(keep("rank_correlation", results, given))


# ---------------------------------------------------------------- agreement


def cases(layers: int) -> Iterator[tuple[str, Weights, Weights]]:
    """What is compared, the weights before and the weights after."""
    before = smollm2(layers)
    generator = torch.Generator().manual_seed(0)
    for share in NOISE:
        after = {
            name: tensor + share * tensor.std() * torch.randn(tensor.shape, generator=generator)
            for name, tensor in before.items()
        }
        yield f"SmolLM2, noise of {share:g} sigma", before, after
        if share == NOISE[0]:
            yield "the same in float16", before, {name: tensor.half() for name, tensor in after.items()}
            yield "the same in bfloat16", before, {name: tensor.bfloat16() for name, tensor in after.items()}
    epochs = list(lenet(EPOCHS))
    for epoch, pair in enumerate(pairwise(epochs)):
        yield f"LeNet on MNIST, epochs {epoch}, {epoch + 1}", *pair


def compared(case: str, before: Weights, after: Weights) -> dict[str, Any]:
    """Bucketed and exact correlation of one case, with the seconds that each took."""
    ranks = MagnitudeRanks(before)
    ranks.update(before)
    bucketed, seconds = timed(lambda: ranks.update(after))
    sides = [
        torch.cat([tensor.float().abs().flatten() for tensor in side.values()]).numpy() for side in (before, after)
    ]
    exact, exact_seconds = timed(lambda: float(spearmanr(*sides).statistic))
    numel = sides[0].size
    held = sum(tensor.numel() * tensor.itemsize for tensor in ranks.state_dict()["tensors"].values())
    return {
        "case": case,
        "numel": numel,
        "exact": exact,
        "bucketed": bucketed,
        "seconds": seconds,
        "exact_seconds": exact_seconds,
        "bytes_a_weight": held / numel,
    }


def smollm2(layers: int) -> dict[str, torch.Tensor]:
    """Prunable weights of the first layers, in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)
    first = tuple(f"model.layers.{layer}." for layer in range(layers))
    return {name: tensor.detach() for name, tensor in prunable_parameters(model).items() if name.startswith(first)}


def lenet(epochs: int) -> Iterator[dict[str, torch.Tensor]]:
    """Weights at initialisation and after each epoch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    images, digits = mnist()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    yield copied(model)
    for _ in range(epochs):
        for batch in torch.randperm(len(digits)).split(25):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[batch]), digits[batch]).backward()
            optimizer.step()
        yield copied(model)


def copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in prunable_parameters(model).items()}


def mnist() -> tuple[torch.Tensor, torch.Tensor]:
    with gzip.open(images_file(), "rt", newline="") as file:
        rows = torch.tensor([[int(cell) for cell in row] for row in csv.reader(file)])
    return rows[:, :-1] / 255, rows[:, -1].clone()


# ---------------------------------------------------------------- cost


def cost(tensors: int, rounds: int) -> dict[str, Any]:
    """Median seconds of each part of a check on a million random float32 weights a tensor."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"layer{index}.weight": torch.randn(1000, 1000, generator=generator) for index in range(tensors)}
    noise = torch.randn(1000, 1000, generator=generator)
    detector, ranks, probe = EarlyBirdDetector(), MagnitudeRanks(weights), MovementProbe(weights)
    seconds: dict[str, list[float]] = {}

    def part(name: str, work: Callable[[], Any]) -> Any:
        result, taken = timed(work)
        seconds.setdefault(name, []).append(taken)
        return result

    for turn in range(rounds + 2):  # the first compiles, the second has a check before it for the first time
        if turn == 2:
            seconds.clear()
        part("read pass", lambda: read(weights))
        mask = part("mask", lambda: create_magnitude_mask(weights, SPARSITY, progress=False))
        part("distance and verdict", lambda mask=mask: detector.update(mask))
        part("movement and null distance", lambda: probe.update(weights, [SPARSITY]))
        part("moved fraction alone", lambda: probe.update(weights, []))
        part("rank correlation", lambda: ranks.update(weights))
        for tensor in weights.values():
            tensor.add_(noise, alpha=0.02)
    return {"numel": tensors * 10**6, "sparsity": SPARSITY, "rounds": rounds, "median_seconds": medians(seconds)}


def read(weights: Weights) -> None:
    """Every weight once, on as many threads as torch uses."""
    chunks = [chunk for tensor in weights.values() for chunk in tensor.view(-1).view(torch.int32).split(CHUNK)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(lambda chunk: chunk.numpy().max(), chunks))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def show(results: Mapping[str, Any]) -> None:
    table = Table("case", "weights", "exact", "bucketed", "difference", "seconds", "seconds, exact")
    for row in results["agreement"]:
        table.add_row(
            row["case"],
            f"{row['numel']:,}",
            f"{row['exact']:.6f}",
            f"{row['bucketed']:.6f}",
            f"{row['bucketed'] - row['exact']:+.1e}",
            f"{row['seconds']:.3f}",
            f"{row['exact_seconds']:.2f}",
        )
    Console().print(table)
    check = results["check"]
    parts = Table("part of a check", "seconds", "read passes", title=f"{check['numel']:,} weights, float32")
    for name, seconds in check["median_seconds"].items():
        parts.add_row(name, f"{seconds:.3f}", f"{seconds / check['median_seconds']['read pass']:.1f}")
    Console().print(parts)


if __name__ == "__main__":
    main()
