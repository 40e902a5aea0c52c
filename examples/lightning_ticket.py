"""An early-bird ticket with Lightning: draw it, rewind, train it.

pip install 'lottery-tickets[lightning]' && python examples/lightning_ticket.py --epochs 15
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_tickets import validate_pruning_correctness
from lottery_tickets.integrations.lightning import EarlyBirdCallback, HoldMaskCallback
from lottery_tickets.vision import lenet_300_100, mnist


class Digits(LightningModule):
    """LeNet-300-100 on MNIST."""

    def __init__(self) -> None:
        super().__init__()
        self.net = lenet_300_100()

    def training_step(self, batch: Any) -> torch.Tensor:
        """Loss of a batch."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def test_step(self, batch: Any) -> None:
        """Accuracy of a batch."""
        self.log("accuracy", (self.net(batch[0]).argmax(-1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, as the papers train this network."""
        return torch.optim.Adam(self.parameters(), lr=1.2e-3)


def main(arguments: list[str] | None = None) -> None:
    """Draw a ticket and train it."""
    options = parsed(arguments)
    seed_everything(options.seed)
    images = mnist()
    chosen = torch.randperm(len(images.train_labels))[: options.samples]
    train = TensorDataset(images.train_inputs[chosen], images.train_labels[chosen])
    loader = DataLoader(train, batch_size=60, shuffle=True)
    model = Digits()
    initial = copy.deepcopy(model.net.state_dict())

    def trainer(*callbacks: Any) -> Trainer:
        return Trainer(
            max_epochs=options.epochs,
            accelerator=options.accelerator,
            callbacks=list(callbacks),
            default_root_dir=options.output,
        )

    # Train until the mask has settled; the loggers show early_bird/distance.
    bird = EarlyBirdCallback(options.sparsity, module="net")
    trainer(bird).fit(model, loader)
    print(bird.results["reason"])

    # Rewind, and train what the mask keeps.
    rest = trainer(HoldMaskCallback(bird.ticket, rewind_to=initial, module="net"))
    rest.fit(model, loader)
    (tested,) = rest.test(
        model, DataLoader(TensorDataset(images.test_inputs, images.test_labels), 1000), verbose=False
    )
    found = validate_pruning_correctness(model.net, bird.ticket)
    wrong = sum(check["not_zero"] for check in found["tensors"].values())
    print(
        f"ticket of sparsity {bird.ticket.sparsity:.2f}: test accuracy {tested['accuracy']:.3f}, {wrong} pruned "
        "weights are not zero"
    )


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="at most to draw it, and to train it")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, help="training images, drawn at random; all if not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", type=Path, default=Path("ticket"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
