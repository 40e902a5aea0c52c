"""Train, prune, rewind, round after round; every state on disk, if there is a folder for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from tqdm import tqdm

from lottery_tickets._iterative._drawing import draw, scores_of
from lottery_tickets._iterative._results import IterativePruningResults, PruningRound
from lottery_tickets._iterative._rewinding import Options, RewindPoint
from lottery_tickets._iterative._schedule import Group
from lottery_tickets._iterative._tickets import load_ticket, save_ticket
from lottery_tickets._iterative._trainings import Trainings, options_of
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import Mask, ShardedMask, held, prunable_parameters, reshard
from lottery_tickets.runs import RunFolder, decoded, encoded
from lottery_tickets.training import (
    Course,
    check_masks_alike,
    early_stopping,
    lies_in_parts,
    restore_tensors,
    tensors_of,
    to_be_written,
)


class Experiment:
    """Iterative pruning that can be left at any batch and gone on with at the latest state.

    Args:
        trainings: How each round's network is trained, and which.
        groups: What is ranked together, and how much of it goes.
        run: The folder to write states to.
        save_every_steps: Batches between states; None for the end of every epoch.
        progress: Show a bar.
    """

    def __init__(
        self,
        trainings: Trainings,
        groups: list[Group],
        run: RunFolder | None,
        *,
        save_every_steps: int | None,
        progress: bool,
    ) -> None:
        self._trainings, self._groups, self._run = trainings, groups, run
        self._model, self._settings = trainings.model, trainings.settings
        self._save_every, self._progress = save_every_steps, progress
        self._round = 0
        self._finished = False  # the round, that is
        self._mask: Mask | ShardedMask | None = None
        self._course = trainings.new()
        self._told = 0  # of the course's evaluations
        self._seconds = 0.0  # in this round, before `_clock`
        self._clock = time.perf_counter()
        self._rewind: RewindPoint | None = None
        self._last_options: Options = []  # of the optimizer, when the dense network had been trained
        self._rounds: list[PruningRound] = []

    def run(self) -> None:
        """Do what is left to do."""
        if self._run is not None and self._run.state is not None:
            self._load(self._run)
        with self._bar() as bar:
            while not (self._finished and self._round == self._settings.num_iterations):
                if self._finished:
                    self._prune()
                self._train(bar)

    def results(self) -> IterativePruningResults:
        """What users get."""
        assert self._rewind is not None
        assert self._mask is not None
        dense, *rounds = self._rounds
        return IterativePruningResults(
            method=f"iterative_{self._settings.criterion_name}_pruning",
            rewind=self._settings.rewind,
            target_sparsity=sum(group.removed[-1] for group in self._groups) / self._mask.numel,
            rewind_epoch=self._settings.rewind_epoch,
            rewind_step=self._rewind.point.step if isinstance(self._course, Course) else None,
            dense=dense,
            iterations=rounds,
            final_mask=self._mask.gathered() if isinstance(self._mask, ShardedMask) else self._mask,
            rewind_state=self._rewind.tensors if self._run is None else str(RewindPoint.path_in(self._run)),
        )

    # ---------------------------------------------------------------- a round

    def _prune(self) -> None:
        """Draw the next mask, and put back what is to be put back."""
        settings = self._settings
        self._round, self._finished = self._round + 1, False
        self._seconds, self._told = 0.0, 0
        weights = self._weights()
        scores = None
        if callable(settings.criterion):
            scores = scores_of(settings.criterion, self._model, weights)
        self._mask = draw(weights, self._mask, self._groups, self._round, scores)
        check_masks_alike(self._trainings.ranks, [self._mask])
        if self._run is not None:
            save_ticket(self._run, self._round, self._mask, settings)
        assert self._rewind is not None
        if settings.rewind == "weights":
            restore_tensors(self._model, self._rewind.tensors)
        self._course = self._trainings.new(self._rewind, self._last_options)

    def _weights(self) -> dict[str, nn.Parameter]:
        """What is pruned, asked for anew each time: modules in parts are whole after a forward pass."""
        reshard(self._model)
        return prunable_parameters(self._model, self._settings.include, self._settings.exclude)

    def _train(self, bar: Any) -> None:
        """What is left of the round."""
        self._clock = time.perf_counter()
        with nullcontext() if self._mask is None else held(self._model, self._mask):
            self._keep_rewind_point()
            course, epoch, seen = self._course, self._course.epoch, self._course.step
            bar.set_description(f"round {self._round} of {self._settings.num_iterations}")
            for step in course.batches():
                bar.update(step - seen)
                self._keep_rewind_point()
                self._tell_evaluations()
                ended, epoch, seen = course.epoch > epoch, course.epoch, step
                due = ended if self._save_every is None else step % self._save_every == 0 and not ended
                if due and epoch < self._settings.epochs:
                    self._save()
        if self._rewind is None:
            raise TrainingError(
                f"rewind_step={self._settings.rewind_step} was not reached: training had {self._course.step} "
                "steps. Rewind to an earlier step or train longer."
            )
        self._finish()

    def _finish(self) -> None:
        """Write down what came of the round."""
        if not self._round:
            self._last_options = options_of(self._course)
        self._finished = True
        record = self._record()
        self._rounds.append(record)
        if self._run is not None:
            self._run.record({"kind": "round", **record})
        self._save()

    def _tell_evaluations(self) -> None:
        """On disk as they come, for whoever watches."""
        for found in self._course.evaluations[self._told :]:
            if self._run is not None:
                self._run.record({"kind": "evaluation", "round": self._round, **found})
        self._told = len(self._course.evaluations)

    def _record(self) -> PruningRound:
        course, mask = self._course, self._mask
        ours = isinstance(course, Course)
        last = course.evaluations[-1] if course.evaluations else None
        best = early_stopping(course.evaluations) if ours else None
        weights = self._weights()
        return PruningRound(
            round=self._round,
            sparsity=0.0 if mask is None else mask.sparsity,
            layer_sparsities=dict.fromkeys(weights, 0.0) if mask is None else mask.layer_sparsity(),
            mask_digest=None if mask is None else mask.digest(),
            steps=course.step - self._start if ours else None,
            skipped=course.skipped,
            train_loss=course.train_loss,
            eval_loss=last and last["loss"],
            accuracy=last and last["accuracy"],
            early_stopping_step=best and best["step"],
            early_stopping_loss=best and best["loss"],
            early_stopping_accuracy=best and best["accuracy"],
            test_loss=last and last["test_loss"],
            test_accuracy=last and last["test_accuracy"],
            early_stopping_test_loss=best and best["test_loss"],
            early_stopping_test_accuracy=best and best["test_accuracy"],
            evaluations=list(course.evaluations),
            seconds=self._seconds + time.perf_counter() - self._clock,
        )

    @property
    def _start(self) -> int:
        """The step at which this round's training began."""
        return self._rewind.point.step if self._round and self._rewind is not None else 0

    def _keep_rewind_point(self) -> None:
        """If training stands at it for the first time."""
        settings, course = self._settings, self._course
        if self._rewind is not None or course.epoch < settings.rewind_epoch:
            return
        if course.step < (settings.rewind_step or 0):
            return
        now = RewindPoint(tensors_of(self._model), course.state(), options_of(course))
        self._rewind = now.copied() if self._run is None else now.kept_in(self._run)

    # ---------------------------------------------------------------- state

    def _save(self) -> None:
        if self._run is None:
            return
        others: dict[str, torch.Tensor] = {}
        values = {
            "round": self._round,
            "finished": self._finished,
            "digest": None if self._mask is None else self._mask.digest(),
            "rewind": self._rewind is not None,
            "seconds": self._seconds + time.perf_counter() - self._clock,
            "last_options": encoded(self._last_options, others, "last options"),
            "course": encoded(self._course.state(), others, "course"),
        }
        files = {"model": tensors_of(self._model), "others": others}
        self._run.save(values, {name: to_be_written(one, self._run.ranks) for name, one in files.items()})

    def _load(self, run: RunFolder) -> None:
        assert run.state is not None
        values, others = run.state.values, run.state.tensors("others")
        restore_tensors(self._model, run.state.tensors("model"))
        self._round, self._finished, self._seconds = values["round"], values["finished"], values["seconds"]
        self._last_options = decoded(values["last_options"], others)
        if values["rewind"]:
            self._rewind = RewindPoint.kept(run)
        if values["digest"] is not None:
            mask = load_ticket(run, self._round, values["digest"])
            self._mask = ShardedMask.of(mask, self._model) if lies_in_parts(self._model) else mask
        self._course = self._trainings.new(self._rewind if self._round else None, self._last_options)
        self._course.load(decoded(values["course"], others))
        self._told = len(self._course.evaluations)
        names = PruningRound.__annotations__
        self._rounds = [
            cast("PruningRound", {name: line[name] for name in names})
            for line in run.lines
            if line["kind"] == "round"
        ]

    # ---------------------------------------------------------------- progress

    @contextmanager
    def _bar(self) -> Iterator[Any]:
        """Over the steps of all rounds, or their epochs under `trainer_fn`."""
        settings, ours = self._settings, isinstance(self._course, Course)
        length = self._trainings.order.length if ours else 1
        total, initial = None, 0
        if length is not None:
            whole = length * settings.epochs
            rest = whole - (settings.rewind_step or length * settings.rewind_epoch)
            total = whole + rest * settings.num_iterations
            before = whole + rest * (self._round - 1) if self._round else 0
            initial = before + self._course.step - (whole - rest if self._round else 0)
        with tqdm(total=total, initial=initial, delay=2, disable=not self._progress) as bar:
            yield bar
