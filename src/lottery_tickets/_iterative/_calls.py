"""Training by a function of the user's, in the form of a `Course`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

from torch import nn

from lottery_tickets.errors import NonfiniteLossError
from lottery_tickets.training import DataOrder, Evaluation, Judge, Point


class Calls:
    """Whole epochs by a function, from an epoch to the last.

    Args:
        model: In training mode.
        train: `train(epochs)`; a number that it returns is recorded for the loss.
        order: Seeds what the data hangs on, before each call.
        epochs: The epoch to stop after.
        halt: An epoch at which to stop on the way.
        judge: Measures the model at the end.
        start: Where to begin.

    Attributes:
        evaluations: What was measured.
        train_loss: What the latest call returned, if it was a number.
        step: Epochs trained.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Callable[[int], Any],
        order: DataOrder,
        *,
        epochs: int,
        halt: int,
        judge: Judge | None,
        start: Point | None,
    ) -> None:
        self.evaluations: list[Evaluation] = []
        self.train_loss: float | None = None
        self.step = 0 if start is None else start.epoch
        self._model, self._train, self._order, self._judge = model, train, order, judge
        self._ends = sorted({halt, epochs})

    @property
    def epoch(self) -> int:
        """The same as `step`."""
        return self.step

    @property
    def skipped(self) -> int:
        """Nothing is known of batches."""
        return 0

    def point(self) -> Point:
        """Where it stands."""
        return Point(self.step, 0, self.step)

    def batches(self) -> Iterator[int]:
        """Train, giving the number of epochs after each call."""
        for end in self._ends:
            if end <= self.step:
                continue
            self._order.seed(self.step)
            returned = self._train(end - self.step)
            self.step = end
            self.train_loss = float(returned) if isinstance(returned, Real) else None
            if self.train_loss is not None and not math.isfinite(self.train_loss):
                raise NonfiniteLossError(f"Epoch {end}: trainer_fn returned {self.train_loss} for its loss.")
            if self._judge is not None and end == self._ends[-1]:
                self.evaluations.append(self._judge.evaluate(self._model, end, last=True))
            yield end

    def state(self) -> dict[str, Any]:
        """As a course's."""
        return {"point": self.point().state(), "train_loss": self.train_loss, "evaluations": self.evaluations}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.step, self.train_loss = Point.of(state["point"]).epoch, state["train_loss"]
        self.evaluations = list(state["evaluations"])
