"""An early-bird ticket in a plain loop with Hugging Face Accelerate: draw it, rewind, train it.

    pip install 'lottery-tickets[hf]' && accelerate launch examples/accelerate_loop.py --epochs 15

The same on one process or several: weights are equal on all of them, and so are the masks drawn from them.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_tickets import (
    create_magnitude_mask,
    held,
    prunable_parameters,
    validate_pruning_correctness,
)
from lottery_tickets.detection import EarlyBirdDetector, MovementProbe
from lottery_tickets.vision import lenet_300_100, mnist


def main(arguments: list[str] | None = None) -> None:
    """Draw a ticket and train it."""
    options = parsed(arguments)
    set_seed(options.seed)
    accelerator = Accelerator(cpu=options.cpu, log_with=options.log_with, project_dir=options.output)
    accelerator.init_trackers("ticket")
    images = mnist()
    chosen = torch.randperm(len(images.train_labels))[: options.samples]
    train = TensorDataset(images.train_inputs[chosen], images.train_labels[chosen])
    bare = lenet_300_100()
    initial = copy.deepcopy(bare.state_dict())
    model, optimizer, loader = accelerator.prepare(
        bare, new_optimizer(bare), DataLoader(train, batch_size=60, shuffle=True)
    )

    # Train until the mask has settled while weights move.
    detector, probe = EarlyBirdDetector(sparsity=options.sparsity), MovementProbe(prunable_parameters(bare))
    for epoch in range(options.epochs + 1):
        if epoch:
            train_epoch(accelerator, model, optimizer, loader)
        mask = create_magnitude_mask(bare, options.sparsity)
        movement = probe.update(prunable_parameters(bare), [])
        verdict = detector.update(mask, moved_fraction=None if movement is None else movement.moved_fraction)
        if verdict.distances:
            accelerator.log({"early_bird/distance": verdict.distances[-1]}, step=epoch)
        accelerator.print(f"epoch {epoch}: {verdict.reason}")
        if verdict.converged:
            break

    # Rewind, and train what the mask keeps.
    bare.load_state_dict(initial)
    optimizer = accelerator.prepare(new_optimizer(bare))
    with held(bare, mask):
        for _ in range(options.epochs):
            train_epoch(accelerator, model, optimizer, loader)
    with torch.no_grad():
        right = bare(images.test_inputs.to(accelerator.device)).argmax(-1).cpu() == images.test_labels
    found = validate_pruning_correctness(bare, mask)
    wrong = sum(check["not_zero"] for check in found["tensors"].values())
    accelerator.print(
        f"ticket of sparsity {mask.sparsity:.2f}: test accuracy {right.float().mean():.3f}, {wrong} pruned "
        "weights are not zero"
    )
    if accelerator.is_main_process:
        options.output.mkdir(parents=True, exist_ok=True)
        mask.save(options.output / "ticket.safetensors")
    accelerator.save_model(model, options.output)
    accelerator.end_training()


def train_epoch(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, loader: DataLoader[Any]
) -> None:
    """Go through the data once."""
    for inputs, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()


def new_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Adam, as the papers train this network."""
    return torch.optim.Adam(model.parameters(), lr=1.2e-3)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="at most to draw it, and to train it")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, help="training images, drawn at random; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--log-with", help="a tracker that accelerate knows: tensorboard, wandb, mlflow")
    parser.add_argument("--output", type=Path, default=Path("ticket"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
