"""One network trained by a recipe, with its pruned weights held at zero, and measured on the way."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from lottery_tickets.masks import Mask, held
from lottery_tickets.training import Course, DataOrder, Evaluation, Judge, Recipe, checkpointed, training


@dataclass(frozen=True)
class Trained:
    """What became of a network.

    Attributes:
        train_loss: Mean over the last epoch.
        evaluations: On the way, and at the end.
        seconds: All in all.
    """

    train_loss: float | None
    evaluations: list[Evaluation]
    seconds: float


def train(
    model: nn.Module,
    mask: Mask | None,
    train_data: Any,
    judge: Judge,
    recipe: Recipe,
    *,
    epochs: int,
    eval_every_steps: int | None,
    seed: int,
    after_epoch: Callable[[], object],
) -> Trained:
    """Train a network from where it stands; the caller's random state is not its own afterwards.

    Raises:
        MaskMismatchError: A mask that does not fit the model.
        NonfiniteLossError: A training that diverged.
    """
    began, order = time.perf_counter(), DataOrder(train_data, seed)
    with (
        training(model),
        nullcontext() if mask is None else held(model, mask),
        checkpointed(model, recipe.gradient_checkpointing) as checkpointing,
    ):
        trainer = recipe.trainer(model, seed, checkpointing=checkpointing)
        course = Course(model, trainer, order, epochs=epochs, judge=judge, eval_every_steps=eval_every_steps)
        done = 0
        for _ in course.batches():
            if course.epoch > done:
                done = course.epoch
                after_epoch()
    return Trained(course.train_loss, course.evaluations, time.perf_counter() - began)
