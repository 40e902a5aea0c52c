"""One training from beginning to end, measured on the way, that can be left at any batch and gone on with."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from torch import nn

from lottery_tickets._batches import BatchLoss, LossFunction, batches_of, measure_mean
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import EvaluationError
from lottery_tickets.masks import reshard
from lottery_tickets.runs import RandomState, private_random_state
from lottery_tickets.training._joined import lies_in_parts
from lottery_tickets.training._order import DataOrder
from lottery_tickets.training._trainer import Progress, Trainer


class Evaluation(TypedDict):
    """A network in the middle of its training, or at its end.

    Attributes:
        step: Batches it was trained on.
        loss: Mean over the validation data.
        accuracy: Share of the validation data's labels that are right; None where labels are not classes.
        test_loss: Mean over the test data; None without any, or where the validation loss is no new minimum and
            training not over.
        test_accuracy: Share of the test data's labels that are right, likewise.
    """

    step: int
    loss: float
    accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None


class Judge:
    """Measures a network on validation data, and on test data where that can matter.

    Whoever stops early wants the test data at the least validation loss, so it is looked at where that falls, and
    at the end. What measuring draws at random, training does not see.

    Args:
        eval_data: Batches, or one batch.
        test_data: Likewise, or None.
        loss_fn: In place of the model's usual loss.
        ranks: Processes with the same weights, each with data of its own, of which all count; None for this
            process alone.
    """

    def __init__(
        self,
        eval_data: Any,
        test_data: Any = None,
        *,
        loss_fn: LossFunction | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._eval_data = batches_of(eval_data)
        self._test_data = None if test_data is None else batches_of(test_data)
        self._loss_fn, self._ranks = loss_fn, ranks

    def evaluate(
        self, model: nn.Module, step: int, before: Sequence[Evaluation] = (), *, last: bool = False
    ) -> Evaluation:
        """Measure the model.

        Args:
            model: In any mode, which it keeps.
            step: Of the training.
            before: Evaluations of the same training.
            last: Whether it is over.

        Raises:
            EvaluationError: Data without batches or labels.
        """
        with private_random_state():
            found = self._measured(model, self._eval_data, "evaluation")
            tested = None
            best = early_stopping(before)
            if self._test_data is not None and (last or best is None or found.mean < best["loss"]):
                tested = self._measured(model, self._test_data, "test")
        return Evaluation(
            step=step,
            loss=found.mean,
            accuracy=found.accuracy,
            test_loss=None if tested is None else tested.mean,
            test_accuracy=None if tested is None else tested.accuracy,
        )

    def _measured(self, model: nn.Module, data: Iterable[Any], what: str) -> BatchLoss:
        reshard(model)  # which the last pass may have left whole
        try:
            return measure_mean(
                model, data, loss_fn=self._loss_fn, ranks=self._ranks, in_step=lies_in_parts(model)
            )
        except EvaluationError as error:
            raise EvaluationError(
                f"The {what} data: {error} One that can be iterated only once is spent after the first time: give "
                "a DataLoader or a list."
            ) from error


def early_stopping(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The first evaluation with the least validation loss; None if no loss is a number.

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 2: the early-stopping iteration is
        that of minimum validation loss.
    """
    numbers = [one for one in evaluations if not math.isnan(one["loss"])]
    return min(numbers, key=lambda one: one["loss"], default=None)


@dataclass(frozen=True)
class Point:
    """Where in the data a training stands.

    Attributes:
        epoch: Whole epochs behind it.
        batch: Batches of the next one behind it.
        step: Batches in all.
        random: The random state to go on from; None at the beginning of an epoch, which is seeded anyhow.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    random: RandomState | None = None

    def state(self) -> dict[str, Any]:
        """As what a run's state can hold."""
        return {**vars(self), "random": None if self.random is None else vars(self.random)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Point:
        """The point that `state` told."""
        random = state["random"]
        return cls(**{**state, "random": None if random is None else RandomState(**random)})


class Course:
    """One training of a model from a point in the data to its end.

    Args:
        model: In training mode; who holds its mask or lends its random state is the caller's affair.
        trainer: What makes the steps.
        order: The data.
        epochs: The epoch to stop after, counted from the beginning of the data and not from `start`.
        judge: Measures the model on the way; None for no measurements.
        eval_every_steps: Batches between evaluations; None for the end of every epoch. The end is always measured.
        start: Where to begin.

    Attributes:
        evaluations: What was measured so far.
        trainer: As it was given.
    """

    def __init__(
        self,
        model: nn.Module,
        trainer: Trainer,
        order: DataOrder,
        *,
        epochs: int,
        judge: Judge | None = None,
        eval_every_steps: int | None = None,
        start: Point | None = None,
    ) -> None:
        self.evaluations: list[Evaluation] = []
        self.trainer = trainer
        self._model, self._order = model, order
        self._epochs, self._judge, self._every = epochs, judge, eval_every_steps
        point = start or Point()
        self._epoch, self._batch, self._step = point.epoch, point.batch, point.step
        self._random = point.random
        self._losses = Progress()  # of the epoch that is being trained
        self._epoch_loss: float | None = None  # of the one before

    @property
    def step(self) -> int:
        """Batches trained on, those before `start` included."""
        return self._step

    @property
    def epoch(self) -> int:
        """Whole epochs behind it."""
        return self._epoch

    @property
    def skipped(self) -> int:
        """Batches that the trainer left out."""
        return self.trainer.progress.skipped

    @property
    def train_loss(self) -> float | None:
        """Mean over the units of the latest epoch, or of what was trained of it."""
        return self._epoch_loss if self._losses.mean_loss is None else self._losses.mean_loss

    def point(self) -> Point:
        """Where it stands; it can be left and gone on with there."""
        return Point(self._epoch, self._batch, self._step, RandomState.now() if self._batch else None)

    def batches(self) -> Iterator[int]:
        """Train, giving the number of steps after every batch, and again after an epoch's last.

        Raises:
            TrainingError: What `Trainer.step` and `DataOrder.epoch` raise.
            EvaluationError: Evaluation data without batches or labels.
        """
        while self._epoch < self._epochs:
            for batch in self._order.epoch(self._epoch, self._batch, self._random):
                part = self.trainer.step(batch)
                if part is not None:
                    self._losses.add(part)
                self._batch += 1
                self._step += 1
                if self._every is not None and self._step % self._every == 0 and not self._at_the_last_batch:
                    self._evaluate()
                yield self._step
            self._epoch, self._batch, self._random = self._epoch + 1, 0, None
            self._epoch_loss, self._losses = self.train_loss, Progress()
            if self._every is None or self._epoch == self._epochs:
                self._evaluate()
            yield self._step

    def run(self) -> None:
        """Train to the end."""
        for _ in self.batches():
            pass

    @property
    def _at_the_last_batch(self) -> bool:
        """Where the loader says how many there are."""
        return self._epoch + 1 == self._epochs and self._batch == self._order.length

    def _evaluate(self) -> None:
        """Measure; at the end test data too, though this step was measured already."""
        if self._judge is None:
            return
        last = self._epoch == self._epochs
        if last and self.evaluations and self.evaluations[-1]["step"] == self._step:
            self.evaluations.pop()
        self.evaluations.append(self._judge.evaluate(self._model, self._step, self.evaluations, last=last))

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """All that the rest hangs on beside the model."""
        return {
            "point": self.point().state(),
            "trainer": self.trainer.state(),
            "losses": asdict(self._losses),
            "epoch_loss": self._epoch_loss,
            "evaluations": list(self.evaluations),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state` gave."""
        point = Point.of(state["point"])
        self._epoch, self._batch, self._step = point.epoch, point.batch, point.step
        self._random = point.random
        self.trainer.load(state["trainer"])
        self._losses = Progress(**state["losses"])
        self._epoch_loss = state["epoch_loss"]
        self.evaluations = [Evaluation(**one) for one in state["evaluations"]]  # type: ignore[typeddict-item]
