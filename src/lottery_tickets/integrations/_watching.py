"""What the early-bird callbacks of all trainers do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lottery_tickets._early_bird._results import EarlyBirdResults, EarlyBirdTraining
from lottery_tickets._early_bird._settings import checked_settings
from lottery_tickets._early_bird._subject import Weights
from lottery_tickets._early_bird._watch import Watch
from lottery_tickets._ranks import Ranks
from lottery_tickets.detection import Criterion
from lottery_tickets.errors import DetectionError, SparsityError, TrainingError
from lottery_tickets.integrations._adapters import uncompiled
from lottery_tickets.integrations._ranks import (
    Saved,
    Tensors,
    handed_out_by_first,
    is_first,
    refuse_parts,
    told_by_first,
)
from lottery_tickets.masks import Mask, Patterns
from lottery_tickets.runs import Json, decoded, encoded
from lottery_tickets.training import lies_in_parts, peak_bytes

_log = logging.getLogger(__name__)

TICKET = "ticket.safetensors"
_PREFIX = "early_bird/"


class WatchingCallback:
    """Base of the early-bird callbacks: when to look, what was seen, and the state that comes back.

    Of a model that every process has whole the first looks and tells the others; `ticket` and `results` are its
    alone. At a model in parts all look together, each at its own, and see the same.
    """

    def __init__(
        self,
        target_sparsity: float,
        *,
        check_interval: int,
        check_every_steps: int | None,
        criterion: Criterion,
        convergence_threshold: float | None,
        stability_window: int | None,
        include: Patterns,
        exclude: Patterns,
        seed: int,
        stop: bool,
    ) -> None:
        self._settings = checked_settings(
            target_sparsity,
            criterion,
            use_magnitude_ranking=False,
            convergence_threshold=convergence_threshold,
            stability_window=stability_window,
            max_epochs=max(1, check_interval) if isinstance(check_interval, int) else 1,
            check_interval=check_interval,
            check_every_steps=check_every_steps,
            include=include,
            exclude=exclude,
            seed=seed,
        )
        if len(self._settings.sparsities) > 1:
            raise SparsityError(
                f"target_sparsity is one fraction, got {target_sparsity!r}; give each a callback and a folder."
            )
        self._stop = stop
        self._watch: Watch | None = None
        self._in_parts = self._settled = False
        self._clock = time.perf_counter()
        self._last_step = -1

    # ---------------------------------------------------------------- looking at it

    @property
    def settled(self) -> bool:
        """Whether the mask has."""
        return self._settled

    @property
    def ticket(self) -> Mask | None:
        """The mask of the check at which it settled, else of the last check; None before the first."""
        return None if self._watch is None or not self._watch.looks else self.results["final_mask"]

    @property
    def results(self) -> EarlyBirdResults:
        """What was found, as `compute_early_bird_tickets` returns it.

        Raises:
            DetectionError: There was no check yet, or this is not the first process.
        """
        if self._watch is None or not self._watch.looks:
            raise DetectionError(
                f"{type(self).__name__} has not looked at any mask: train with it among the Trainer's callbacks, "
                "and ask the first process."
            )
        trained = EarlyBirdTraining(steps=self._last_step, skipped=0, mean_loss=None)
        return self._watch.results(f"training is at step {self._last_step}", trained)[0]

    # ---------------------------------------------------------------- a check

    def _begin(self, model: nn.Module) -> None:
        """Watch this model from now on, with nothing seen yet."""
        model = uncompiled(model)
        refuse_parts(model)
        self._in_parts = lies_in_parts(model)
        if self._in_parts and self._settings.criterion == "rank_correlation":
            raise TrainingError(
                f"criterion='rank_correlation' ranks whole tensors, and {type(model).__name__} is sharded over "
                "processes. Use 'window' or 'queue', or train with DDP."
            )
        self._settled, self._last_step, self._clock = False, -1, time.perf_counter()
        self._watch = None
        if self._in_parts or is_first():
            ranks = Ranks.world() if self._in_parts else Ranks()
            self._watch = Watch(Weights(model, self._settings), self._settings, None, ranks)

    def _due(self, *, epoch: int | None, step: int) -> bool:
        """Whether to look now; `epoch` is the number of epochs that have just been completed, None inside one."""
        if self._settled or step <= self._last_step:
            return False
        if step == 0:
            return True
        every = self._settings.check_every_steps
        if every is not None:
            return step % every == 0
        return epoch is not None and epoch % self._settings.check_interval == 0

    def _check(self, model: nn.Module, *, epoch: int, step: int) -> dict[str, float]:
        """Look, and return the figures to log; none in a process that does not look."""
        figures: dict[str, float] = {}

        def look() -> bool:
            assert self._watch is not None
            (line,) = self._watch.look(
                epoch=epoch,
                step=step,
                train_loss=None,
                seconds=time.perf_counter() - self._clock,
                peak_bytes=peak_bytes(model),
            )
            figures.update(_figures(line, settled=self._watch.settled))
            return self._watch.settled

        if self._in_parts:
            with Ranks.world().together():
                self._settled = look()
        else:
            self._settled = told_by_first(look)
        self._last_step, self._clock = step, time.perf_counter()
        if self._settled and is_first():
            _log.info("step %d: %s", step, self.results["reason"])
        return figures

    def _save_ticket(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """The ticket as a file."""
        results = self.results
        folder.mkdir(parents=True, exist_ok=True)
        results["final_mask"].save(
            folder / TICKET,
            metadata={
                "criterion": "magnitude",
                "target_sparsity": str(results["target_sparsity"]),
                "early_bird": results["method"],
                "epoch": str(results["convergence_epoch"]),
                "step": str(results["convergence_step"]),
                **metadata,
            },
        )

    # ---------------------------------------------------------------- state

    def _lines(self) -> list[dict[str, Any]]:
        """What was seen at each check, as JSON can hold it."""
        if self._watch is None or not self._watch.looks:
            return []
        sparsity = self._settings.sparsities[0]
        return [{"target_sparsity": sparsity, **line} for line in self.results["checkpoints"]]

    def _state(self) -> tuple[dict[str, Json], Tensors]:
        """What the next check depends on beside the model, as JSON and tensors, which are not copied."""
        assert self._watch is not None
        tensors: Tensors = {}
        return {"step": self._last_step, "watch": encoded(self._watch.state(), tensors, "watch")}, tensors

    def _go_on(self, find: Callable[[], Saved | None]) -> None:
        """Take up what the first process finds of an earlier `_state` and its `_lines`, if anything."""

        def load(saved: Saved | None) -> tuple[bool, int]:
            if saved is None:
                return False, -1
            assert self._watch is not None
            values, tensors, lines = saved
            self._watch.load(decoded(values["watch"], tensors), lines)
            return self._watch.settled, values["step"]

        if self._in_parts:
            self._settled, self._last_step = load(handed_out_by_first(find))
        else:
            self._settled, self._last_step = told_by_first(lambda: load(find()))


def _figures(line: Mapping[str, Any], *, settled: bool) -> dict[str, float]:
    """What a check says, under the names that trackers show."""
    distances = line["distances"]
    figures = {
        "distance": distances[-1] if distances else None,
        "null_distance": line["null_distance"],
        "moved_fraction": line["moved_fraction"],
        "rank_correlation": line["rank_correlation"],
        "settled": float(settled),
    }
    return {_PREFIX + name: float(value) for name, value in figures.items() if value is not None}
