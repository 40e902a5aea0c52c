"""Train, look, write down, until every mask has settled or the epochs are over."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from numbers import Real
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lottery_tickets._early_bird._results import EarlyBirdResults, EarlyBirdTraining
from lottery_tickets._early_bird._settings import Settings
from lottery_tickets._early_bird._watch import Watch
from lottery_tickets.errors import NonfiniteLossError, TrainingError, WeightsError
from lottery_tickets.runs import RandomState, RunFolder, decoded, encoded
from lottery_tickets.training import (
    DataOrder,
    Progress,
    Trainer,
    peak_bytes,
    restore_tensors,
    tensors_of,
    to_be_written,
)

_log = logging.getLogger(__name__)

TrainEpochs = Callable[[int], Any]


@dataclass
class Position:
    """Where in the data a search stands.

    Attributes:
        epoch: Whole epochs behind it.
        batch: Batches of the next one behind it.
    """

    epoch: int = 0
    batch: int = 0


class Search:
    """A search for early-bird tickets that can be left at any check and gone on with.

    Args:
        model: In training mode.
        settings: When to look and what counts.
        order: The data.
        watch: The masks.
        trainer: Ours, or the user's function of the number of epochs.
        run: The folder to write states to.
        progress: Show a bar.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: Settings,
        order: DataOrder,
        watch: Watch,
        trainer: Trainer | TrainEpochs,
        run: RunFolder | None,
        *,
        progress: bool,
    ) -> None:
        self.reason: str | None = None
        self._model, self._settings, self._order, self._watch = model, settings, order, watch
        self._trainer, self._run, self._progress = trainer, run, progress
        self._position = Position()
        self._random: RandomState | None = None
        self._since = Progress()  # what was trained since the check before
        self._clock = time.perf_counter()
        self._seconds_training = self._seconds_checking = 0.0

    def run(self) -> None:
        """Train and look until there is a reason to stop."""
        if self._run is not None and self._run.state is not None:
            self._load(self._run)
        if self.reason is not None:
            return
        if not self._watch.looks:
            self._check(None)
        try:
            self._train(self._trainer) if isinstance(self._trainer, Trainer) else self._have_trained(self._trainer)
        except (NonfiniteLossError, WeightsError) as error:
            if not self._trained:
                raise
            _log.warning("%s", error)
            self._stop(str(error))
        if self.reason is None:
            self._stop(self._watch.ending())
        self._tell_overhead()

    def _stop(self, reason: str) -> None:
        self.reason = reason
        self._save()

    def _tell_overhead(self) -> None:
        """How long the checks of this call have taken beside its training."""
        if self._seconds_training:
            share = self._seconds_checking / self._seconds_training
            figures = self._seconds_checking, self._seconds_training, 100 * share
            _log.info("checks took %.1f s beside %.1f s of training: %.2f%%", *figures)

    def results(self) -> list[EarlyBirdResults]:
        """What was found, by sparsity."""
        assert self.reason is not None
        progress = self._trainer.progress if isinstance(self._trainer, Trainer) else None
        trained = EarlyBirdTraining(
            steps=None if progress is None else progress.steps,
            skipped=0 if progress is None else progress.skipped,
            mean_loss=None if progress is None else progress.mean_loss,
        )
        return self._watch.results(self.reason, trained)

    # ---------------------------------------------------------------- training

    def _train(self, trainer: Trainer) -> None:
        length, epochs = self._order.length, self._settings.max_epochs
        bar = tqdm(
            total=None if length is None else length * epochs,
            initial=0 if length is None else length * self._position.epoch + self._position.batch,
            desc="training",
            delay=2,
            disable=not self._progress,
        )
        with bar:
            while self.reason is None and self._position.epoch < epochs:
                self._epoch(trainer, bar)
        if not self._trained:
            raise TrainingError(
                f"No batch was trained: all {trainer.progress.skipped} were left out, their loss or gradient not "
                "being finite. Lower the learning rate, or look at the data and the initial weights."
            )

    def _epoch(self, trainer: Trainer, bar: Any) -> None:
        """What is left of the epoch, or of it until everything has settled."""
        position, every = self._position, self._settings.check_every_steps
        for batch in self._order.epoch(position.epoch, position.batch, self._random):
            part = trainer.step(batch)
            position.batch += 1
            bar.update()
            if part is None:
                continue
            self._since.add(part)
            if every is not None and trainer.progress.steps % every == 0:
                self._check(self._since.mean_loss)
                if self.reason is not None:
                    return
        position.epoch, position.batch = position.epoch + 1, 0
        if every is None and position.epoch % self._settings.check_interval == 0:
            self._check(self._since.mean_loss)

    def _have_trained(self, train: TrainEpochs) -> None:
        """Epochs by the user's own function."""
        settings, position = self._settings, self._position
        while self.reason is None and position.epoch < settings.max_epochs:
            count = min(settings.check_interval, settings.max_epochs - position.epoch)
            self._order.seed(position.epoch)
            returned = train(count)
            position.epoch += count
            loss = float(returned) if isinstance(returned, Real) else None
            if loss is not None and not math.isfinite(loss):
                raise NonfiniteLossError(f"Epoch {position.epoch}: trainer_fn returned {loss} for its loss.")
            if count == settings.check_interval:
                self._check(loss)

    @property
    def _trained(self) -> bool:
        return self._trainer.progress.steps > 0 if isinstance(self._trainer, Trainer) else self._position.epoch > 0

    # ---------------------------------------------------------------- checks

    def _check(self, train_loss: float | None) -> None:
        """Look at the mask, and write down what was seen and where everything stands."""
        now = time.perf_counter()
        position = self._position
        lines = self._watch.look(
            epoch=position.epoch + (position.batch > 0),
            step=self._trainer.progress.steps if isinstance(self._trainer, Trainer) else None,
            train_loss=train_loss,
            seconds=now - self._clock,
            peak_bytes=peak_bytes(self._model),
        )
        if self._watch.settled or position.epoch == self._settings.max_epochs:
            self.reason = self._watch.ending()
        if self._run is not None:
            for line in lines:
                self._run.record(line)
        self._since = Progress()
        self._seconds_training += now - self._clock
        self._seconds_checking += time.perf_counter() - now
        self._save()
        self._clock = time.perf_counter()

    # ---------------------------------------------------------------- state

    def _save(self) -> None:
        if self._run is None:
            return
        others: dict[str, torch.Tensor] = {}
        trainer = self._trainer.state() if isinstance(self._trainer, Trainer) else None
        values = {
            "position": asdict(self._position),
            "reason": self.reason,
            "trainer": encoded(trainer, others, "trainer"),
            "watch": encoded(self._watch.state(), others, "watch"),
            "random": encoded(vars(RandomState.now()), others, "random"),
        }
        files = {"model": tensors_of(self._model), "others": others}
        self._run.save(values, {name: to_be_written(one, self._run.ranks) for name, one in files.items()})

    def _load(self, run: RunFolder) -> None:
        assert run.state is not None
        values, others = run.state.values, run.state.tensors("others")
        restore_tensors(self._model, run.state.tensors("model"))
        self._position = Position(**values["position"])
        self.reason = values["reason"]
        if isinstance(self._trainer, Trainer):
            self._trainer.load(decoded(values["trainer"], others))
        self._watch.load(decoded(values["watch"], others), run.lines)
        self._random = RandomState(**decoded(values["random"], others))
