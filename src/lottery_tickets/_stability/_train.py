"""Training that can be left at a step and gone on with under another order of the data."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

from torch import nn

from lottery_tickets.errors import TrainingError
from lottery_tickets.runs import private_random_state
from lottery_tickets.training import Course, DataOrder, Point, Recipe, checkpointed, described, training


class TrainFunction(Protocol):
    """Trains a model in place, from one step to another.

    `start` is the step at which the model stands, `stop` the one to leave it at, None for the end of training;
    `seed` fixes the order of the data and all that is drawn in training. `state` is what an earlier call returned
    at step `start`, possibly one with another seed; None at step 0. What the function returns is what the next
    call needs: optimizer, schedule, place in the data; as numbers, text, tensors, and lists and mappings of them,
    not the model's own tensors.
    """

    def __call__(self, model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any: ...


@dataclass(frozen=True)
class Training:
    """A `TrainFunction` by this library's trainer; see `make_train_function`.

    Attributes:
        dataloader: Batches.
        epochs: The whole training.
        recipe: How to train.
    """

    dataloader: Any
    epochs: int
    recipe: Recipe

    def __call__(self, model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any:
        """Train; an order of another seed begins in the middle of its epoch, at the batch of that number."""
        order = DataOrder(self.dataloader, seed)
        with (
            private_random_state(),
            training(model),
            checkpointed(model, self.recipe.gradient_checkpointing) as checkpointing,
        ):
            trainer = self.recipe.trainer(model, seed, checkpointing=checkpointing)
            point = Point()
            if state is not None:
                trainer.load(state["trainer"])
                point = Point.of(state["point"])
                if state["seed"] != seed:
                    point = replace(point, random=None)
            if point.step != start:
                raise TrainingError(f"start={start}, but the state given stands at step {point.step}.")
            course = Course(model, trainer, order, epochs=self.epochs, start=point)
            _run(course, stop, order.length)
            return {"seed": seed, "point": course.point().state(), "trainer": trainer.state()}

    def configuration(self) -> dict[str, Any]:
        """What the outcome depends on, as JSON."""
        told = {field.name: described(getattr(self.recipe, field.name)) for field in fields(self.recipe)}
        return {"epochs": self.epochs, "batches": DataOrder(self.dataloader, 0).length, **told}


def _run(course: Course, stop: int | None, length: int | None) -> None:
    """To that step, or to the end."""
    if stop is None:
        course.run()
        return
    batches = course.batches()
    for step in batches:
        if step >= stop:
            if course.point().batch == length:
                next(batches)  # over the end of the epoch, so that it is not read again to be passed over
            return
    raise TrainingError(
        f"Training ends after {course.step} steps, so none can be left at step {stop}. Rewind to an earlier "
        "step or train for more epochs."
    )
