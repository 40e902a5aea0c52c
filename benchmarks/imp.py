"""What iterative magnitude pruning costs: ours against loops that a user would write.

    python benchmarks/imp.py [--quick] [--repeats N]

LeNet-300-100 on Fashion-MNIST's 60,000 images, held as tensors, batches of 60, Adam at 1.2e-3, one thread. Every
way trains the dense network for one epoch, then prunes 20% of the weights globally, rewinds to the initialisation
and trains again, twice; all by the same batches. The loop by hand multiplies the weights by their masks after each
step, as most code does, and leaves gradients and Adam's averages of pruned weights alone; ours holds those at zero
too, looks for losses and gradients that are not finite, and counts what it trains. torch's own pruning masks in
every forward pass. Ways are interleaved; the bar is 1.05 times the loop by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from _common import MIB, benchmark_parser, interleaved, keep, medians, peak_bytes_in_fresh_process
from lottery_tickets import prunable_parameters
from lottery_tickets.iterative_pruning import compute_iterative_magnitude_pruning
from lottery_tickets.training import DataOrder
from lottery_tickets.vision import TensorBatches, fashion_mnist, lenet_300_100

LEARNING_RATE = 1.2e-3
BATCH_SIZE = 60
ROUNDS = 2
FRACTION = 0.2
TIME_BAR = 1.05
QUICK_IMAGES = 6000
Optimizer = Callable[..., torch.optim.Optimizer]


def adam(parameters: Any, lr: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """Adam as it comes: on the CPU one operation after another."""
    return torch.optim.Adam(parameters, lr=lr)


def fused_adam(parameters: Any, lr: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """Adam in one pass over the weights, which torch leaves to the user to ask for."""
    return torch.optim.Adam(parameters, lr=lr, fused=True)


def network() -> nn.Module:
    """The same initial weights for all ways."""
    torch.manual_seed(0)
    return lenet_300_100(init="glorot")


def by_hand(batches: TensorBatches, make: Optimizer) -> nn.Module:
    """Train, take the threshold of all weights, rewind, multiply by masks after every step."""
    model = network()
    initial = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    weights = [(name, one) for name, one in model.named_parameters() if one.dim() > 1]
    masks = [torch.ones_like(one) for _, one in weights]
    for number in range(ROUNDS + 1):
        if number:
            with torch.no_grad():
                kept = torch.cat([one[mask > 0].abs() for (_, one), mask in zip(weights, masks, strict=True)])
                threshold = kept.kthvalue(round(FRACTION * len(kept))).values
                masks = [mask * (one.abs() > threshold) for (_, one), mask in zip(weights, masks, strict=True)]
                for name, one in model.named_parameters():
                    one.copy_(initial[name])
                for (_, one), mask in zip(weights, masks, strict=True):
                    one.mul_(mask)
        optimizer = make(model.parameters())
        for inputs, labels in DataOrder(batches, 0).epoch(0):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if number:
                with torch.no_grad():
                    for (_, one), mask in zip(weights, masks, strict=True):
                        one.mul_(mask)
    return model


def by_torch(batches: TensorBatches, make: Optimizer) -> nn.Module:
    """`torch.nn.utils.prune`, its weights rewound by hand."""
    model = network()
    initial = [one.detach().clone() for one in model.parameters()]
    layers = [(module, "weight") for module in model.modules() if isinstance(module, nn.Linear)]
    for number in range(ROUNDS + 1):
        if number:
            prune.global_unstructured(layers, prune.L1Unstructured, amount=FRACTION)
            with torch.no_grad():
                named = {name.removesuffix("_orig"): one for name, one in model.named_parameters()}
                for name, value in zip(dict(network().named_parameters()), initial, strict=True):
                    named[name].copy_(value)
        optimizer = make(model.parameters())
        for inputs, labels in DataOrder(batches, 0).epoch(0):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    return model


def ours(batches: TensorBatches, optimizer: str | Optimizer) -> nn.Module:
    """The library's function."""
    model = network()
    compute_iterative_magnitude_pruning(
        model,
        batches,
        num_iterations=ROUNDS,
        prune_fraction=FRACTION,
        epochs=1,
        optimizer=optimizer,
        learning_rate=LEARNING_RATE,
        progress=False,
    )
    return model


WAYS: dict[str, tuple[Callable[..., nn.Module], Any]] = {
    "ours": (ours, "adam"),
    "by hand, fused Adam": (by_hand, fused_adam),
    "by hand, Adam as it comes": (by_hand, adam),
    "ours, Adam as it comes": (ours, adam),
    "torch.nn.utils.prune, fused Adam": (by_torch, fused_adam),
    "torch.nn.utils.prune, Adam as it comes": (by_torch, adam),
}


def prepare(way: str, images: int) -> Callable[[], object]:
    """One way, for a fresh process."""
    function, optimizer = WAYS[way]
    batches = load(images)
    torch.set_num_threads(1)
    ours(TensorBatches(*next(iter(batches)), BATCH_SIZE), "adam")  # compiled kernels, which stay in memory
    return lambda: function(batches, optimizer)


def load(count: int) -> TensorBatches:
    """The first images, shuffled."""
    images = fashion_mnist()
    return TensorBatches(images.train_inputs[:count], images.train_labels[:count], BATCH_SIZE, shuffle=True)


def kept(model: nn.Module) -> int:
    """Weights left: those of `torch.nn.utils.prune` are a product."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return sum(int(one.count_nonzero()) for one in weights)


def measure(images: int, repeats: int) -> dict[str, Any]:
    """All figures of this benchmark."""
    torch.set_num_threads(1)
    batches = load(images)
    small = TensorBatches(*next(iter(batches)), BATCH_SIZE)
    for function, optimizer in WAYS.values():
        function(small, optimizer)  # compiled kernels and torch's own first calls
    ends: dict[str, int] = {}

    def work(way: str) -> Callable[[], None]:
        function, optimizer = WAYS[way]

        def run() -> None:
            ends[way] = kept(function(batches, optimizer))

        return run

    seconds = interleaved({way: work(way) for way in WAYS}, repeats)
    typical = medians(seconds)
    return {
        "network": "LeNet-300-100",
        "data": "fashion-mnist",
        "images": images,
        "batch_size": BATCH_SIZE,
        "rounds": ROUNDS,
        "repeats": repeats,
        "weights": sum(one.numel() for one in prunable_parameters(network()).values()),
        "steps": len(batches) * (ROUNDS + 1),
        "seconds": seconds,
        "median_seconds": typical,
        "slowest_over_fastest": {way: max(values) / min(values) for way, values in seconds.items()},
        "kept": ends,
        "time_bar": TIME_BAR,
        "ratios": {way: typical["ours"] / seconds_ for way, seconds_ in typical.items()},
        "as_it_comes_ratio": typical["ours, Adam as it comes"] / typical["by hand, Adam as it comes"],
        "peak_bytes": {way: peak_bytes_in_fresh_process(prepare, way, images) for way in WAYS},
    }


def table(results: dict[str, Any]) -> Table:
    """The ways beside each other."""
    shown = Table(title=f"{results['rounds']} rounds of LeNet-300-100, {results['images']} images, one epoch each")
    for heading in (
        "",
        "median",
        "a step",
        "ours takes",
        "slowest / fastest",
        "peak memory above the data",
        "kept",
    ):
        shown.add_column(heading, justify="right")
    for way, seconds in results["median_seconds"].items():
        shown.add_row(
            way,
            f"{seconds:.2f} s",
            f"{seconds / results['steps'] * 1e6:.0f} us",
            f"x {results['ratios'][way]:.3f}",
            f"{results['slowest_over_fastest'][way]:.2f}",
            f"{results['peak_bytes'][way] / MIB:.0f} MiB",
            f"{results['kept'][way]:,}",
        )
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/imp.json."""
    parser = benchmark_parser(__doc__, "a tenth of the images")
    parser.add_argument("--repeats", type=int, default=7)
    chosen = parser.parse_args()
    results = measure(QUICK_IMAGES if chosen.quick else 60_000, chosen.repeats)
    console = Console(width=140)
    console.print(table(results))
    console.print(keep("imp", results, chosen))


if __name__ == "__main__":
    main()
