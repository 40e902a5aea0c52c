"""One network trained and measured, and pieces of work that are done once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

from torch import nn

from lottery_tickets import Mask, held
from lottery_tickets._atomic import replacing
from lottery_tickets.training import Course, DataOrder, Evaluation, Judge, Recipe, early_stopping, training
from lottery_tickets.vision import Images, Part, TensorBatches

EVALUATION_BATCH = 1000
WARM_UP, PROBE = 10, 50  # steps


def once(path: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What the file says, or the work's result, which is then written there."""
    if not path.exists():
        found = work()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf-8")
    told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return told


class Data:
    """The batches of one seed.

    Args:
        images: To train and to test on.
        validation: For early stopping.
        batch_size: Of training.
    """

    def __init__(self, images: Images, validation: Part, batch_size: int) -> None:
        self.training = Part(images.train_inputs, images.train_labels)
        self.train = TensorBatches(images.train_inputs, images.train_labels, batch_size, shuffle=True)
        self.validation = TensorBatches(*validation, EVALUATION_BATCH)
        self.test = TensorBatches(images.test_inputs, images.test_labels, EVALUATION_BATCH)


def step_and_look(model: nn.Module, recipe: Recipe, data: Data) -> tuple[float, float]:
    """Seconds of a step, and of measuring the network."""
    with training(model):
        trainer, order = recipe.trainer(model, 0), DataOrder(data.train, 0)
        batches = (batch for epoch in count() for batch in order.epoch(epoch))
        for _ in range(WARM_UP):
            trainer.step(next(batches))
        start = time.perf_counter()
        for _ in range(PROBE):
            trainer.step(next(batches))
        step = (time.perf_counter() - start) / PROBE
        start = time.perf_counter()
        Judge(data.validation, data.test).evaluate(model, 0)
        return step, time.perf_counter() - start


def train(
    model: nn.Module,
    mask: Mask | None,
    data: Data,
    recipe: Recipe,
    *,
    epochs: int,
    eval_every_steps: int,
    seed: int,
) -> dict[str, Any]:
    """Train a network, or a part of it that stays as sparse as it is."""
    order = DataOrder(data.train, seed)
    with training(model), nullcontext() if mask is None else held(model, mask):
        course = Course(
            model,
            recipe.trainer(model, seed),
            order,
            epochs=epochs,
            judge=Judge(data.validation, data.test),
            eval_every_steps=eval_every_steps,
        )
        course.run()
    return summary(course.evaluations)


def summary(evaluations: list[Evaluation]) -> dict[str, Any]:
    """Where it would have been stopped early, what it knew then and at the end."""
    best, last = early_stopping(evaluations), evaluations[-1]
    assert best is not None
    return {
        "early_stopping_step": best["step"],
        "early_stopping_test_accuracy": best["test_accuracy"],
        "early_stopping_accuracy": best["accuracy"],
        "test_accuracy": last["test_accuracy"],
        "accuracy": last["accuracy"],
        "steps": last["step"],
    }


def of_round(told: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a round of iterative pruning."""
    return summary(told["evaluations"])
