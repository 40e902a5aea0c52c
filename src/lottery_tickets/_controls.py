"""A ticket beside its controls: networks trained from the same initial weights on the same data."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from typing import Any, TypedDict

import torch
from torch import nn
from tqdm import tqdm

from lottery_tickets._batches import measure_mean
from lottery_tickets._statistics import Interval, share_interval
from lottery_tickets.errors import EvaluationError
from lottery_tickets.masks import Mask, held
from lottery_tickets.runs import private_random_state
from lottery_tickets.training import DataOrder, Trainer, make_optimizer, restore_tensors, training


class Trained(TypedDict):
    """One network after training.

    Attributes:
        sparsity: Fraction of the prunable weights that were held at zero; 0 for the dense network.
        train_loss: Mean over all units trained on, from the first step to the last.
        test_loss: Mean over the test data.
        accuracy: Fraction of the test samples whose class is right.
        accuracy_interval: 95% interval of it over test samples (Wilson's).
        seconds: Of training.
    """

    sparsity: float
    train_loss: float | None
    test_loss: float
    accuracy: float
    accuracy_interval: Interval
    seconds: float


def train_side_by_side(
    model: nn.Module,
    initial: Mapping[str, torch.Tensor],
    masks: Mapping[str, Mask | None],
    train_data: Iterable[Any],
    test_data: Iterable[Any],
    *,
    epochs: int,
    optimizer: str = "sgd",
    learning_rate: float,
    momentum: float = 0.0,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Trained]:
    """Train each ticket from the initial weights, its pruned weights held at zero, and test it.

    All see the same batches in the same order and the same seeds, by one optimizer at one learning rate.

    Args:
        model: A classifier, on one device; it comes back as the last network trained.
        initial: What `tensors_of(model)` gave before anything was trained.
        masks: Name to a ticket, or to None for the dense network.
        train_data: Batches, gone through once an epoch.
        test_data: Batches of classes.
        epochs: Of each.
        optimizer: A name of `make_optimizer`.
        learning_rate: Of the optimizer.
        momentum: Of SGD.
        seed: Of the order of the data.
        progress: Show a bar on anything that takes over two seconds.

    Returns:
        Name to what became of it.

    Raises:
        EvaluationError: Test data that does not hold classes.
        NonfiniteLossError: A training that diverged.
    """
    found = {}
    bar = tqdm(total=epochs * len(masks), desc="training", unit=" epochs", delay=2, disable=not progress)
    with bar, private_random_state():
        for name, mask in masks.items():
            restore_tensors(model, initial)
            stepper = make_optimizer(optimizer, model.named_parameters(), lr=learning_rate, momentum=momentum)
            trainer, order = Trainer(model, stepper), DataOrder(train_data, seed)
            began = time.perf_counter()
            with training(model), nullcontext() if mask is None else held(model, mask):
                for epoch in range(epochs):
                    for batch in order.epoch(epoch):
                        trainer.step(batch)
                    bar.update()
            seconds = time.perf_counter() - began
            tested = measure_mean(model, test_data)
            if tested.correct is None:
                raise EvaluationError("The test data has no classes to be right about; give integer labels.")
            found[name] = Trained(
                sparsity=0.0 if mask is None else mask.sparsity,
                train_loss=trainer.progress.mean_loss,
                test_loss=tested.mean,
                accuracy=tested.correct / tested.units,
                accuracy_interval=share_interval(tested.correct, tested.units, 0.95),
                seconds=seconds,
            )
    return found
