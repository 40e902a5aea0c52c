"""Masks of a model at several sparsities, looked at again and again until they have settled."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from lottery_tickets._early_bird._masks import mask_from, mask_state
from lottery_tickets._early_bird._results import EarlyBirdCheckpoint, EarlyBirdResults, EarlyBirdTraining
from lottery_tickets._early_bird._settings import Settings
from lottery_tickets._early_bird._subject import Subject
from lottery_tickets._ranks import Ranks
from lottery_tickets.detection import (
    Criterion,
    DetectorState,
    EarlyBirdDetector,
    MagnitudeRanks,
    MovementProbe,
    Verdict,
)
from lottery_tickets.masks import Mask
from lottery_tickets.training import check_masks_alike

# How verdicts on masks that cannot but agree begin.
STILL = "weights are not moving"


class _Bird:
    """One sparsity: its detector, and what it has seen."""

    def __init__(self, sparsity: float, settings: Settings) -> None:
        self.sparsity = sparsity
        self.detector = EarlyBirdDetector(
            settings.criterion, sparsity=sparsity, threshold=settings.threshold, window=settings.window
        )
        self.checkpoints: list[EarlyBirdCheckpoint] = []
        self.settled = False
        self._verdict = ""

    @property
    def mask(self) -> Mask:
        """That of the last check."""
        return self.detector.masks[-1]

    @property
    def least_checks(self) -> int:
        """Fewer than this cannot settle anything: a distance or a correlation needs two."""
        return self.detector.window + (self.detector.criterion != "queue")

    def see(self, mask: Mask, correlation: float | None, moved_fraction: float | None) -> Verdict:
        """Hand the mask to the detector."""
        verdict = self.detector.update(mask, correlation=correlation, moved_fraction=moved_fraction)
        self.settled, self._verdict = verdict.converged, verdict.reason
        return verdict

    def state(self) -> dict[str, Any]:
        """All but the checkpoints."""
        state = self.detector.state_dict()
        return {
            "settled": self.settled,
            "verdict": self._verdict,
            "record": state["record"],
            "masks": [mask_state(mask) for mask in state["masks"]],
        }

    def load(self, state: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a state and the lines of the checkpoints."""
        self.settled, self._verdict = state["settled"], state["verdict"]
        masks = [mask_from(mask) for mask in state["masks"]]
        self.detector.load_state_dict(DetectorState(record=state["record"], masks=masks))
        names = EarlyBirdCheckpoint.__annotations__
        self.checkpoints = [cast("EarlyBirdCheckpoint", {name: line[name] for name in names}) for line in lines]

    def result(
        self, ending: str, training: EarlyBirdTraining, criterion: Criterion, subject: Subject
    ) -> EarlyBirdResults:
        """What users get."""
        last = self.checkpoints[-1]
        return EarlyBirdResults(
            converged=self.settled,
            convergence_epoch=last["epoch"] if self.settled else None,
            convergence_step=last["step"] if self.settled else None,
            final_mask=subject.ticket(self.mask),
            checkpoints=self.checkpoints,
            method=criterion,
            target_sparsity=self.sparsity,
            training=training,
            reason=self._why(ending),
            null_distance=last["null_distance"],
        )

    def _why(self, ending: str) -> str:
        if self.settled:
            return self._verdict
        if len(self.checkpoints) == 1:
            return ending
        if self._verdict.startswith(STILL):
            return f"{self._verdict}; {ending}"
        return f"{ending}; at the last check {self._verdict}"


class Watch:
    """Draws the masks of all sparsities from one counting pass and hands each to its detector.

    Args:
        subject: What is watched.
        settings: Sparsities and criterion.
        masks_folder: Every mask is saved there; None for none.
        ranks: Processes that have the same model, and should draw the same masks.
    """

    def __init__(
        self, subject: Subject, settings: Settings, masks_folder: Path | None, ranks: Ranks | None = None
    ) -> None:
        self._subject, self._settings, self._folder = subject, settings, masks_folder
        self._everyone = ranks or Ranks()
        tensors = subject.tensors()
        self._birds = [_Bird(sparsity, settings) for sparsity in settings.sparsities]
        self._probe = MovementProbe(tensors, seed=settings.seed)
        self._ranks = MagnitudeRanks(tensors) if settings.criterion == "rank_correlation" else None
        self.looks = 0

    @property
    def settled(self) -> bool:
        """Whether all masks have."""
        return all(bird.settled for bird in self._birds)

    def look(
        self,
        *,
        epoch: int,
        step: int | None,
        train_loss: float | None,
        seconds: float,
        peak_bytes: int | None,
    ) -> list[dict[str, Any]]:
        """Draw the masks of the sparsities that have not settled, and judge them.

        Returns:
            A line for each, with its sparsity and the fields of `EarlyBirdCheckpoint`.

        Raises:
            WeightsError: Weights that are not numbers; nothing has been judged then.
            DistributedError: Ranks draw different masks.
        """
        began = time.perf_counter()
        birds = [bird for bird in self._birds if not bird.settled]
        sparsities = [bird.sparsity for bird in birds]
        tensors = self._subject.tensors()
        masks = self._subject.masks(tensors, sparsities)
        check_masks_alike(self._everyone, masks)
        movement = self._probe.update(tensors, sparsities)
        correlation = None if self._ranks is None else self._ranks.update(tensors)
        moved = None if movement is None else movement.moved_fraction
        for bird, mask in zip(birds, masks, strict=True):
            null = None if movement is None else movement.by_sparsity[bird.sparsity]
            verdict = bird.see(mask, correlation, moved)
            bird.checkpoints.append(
                EarlyBirdCheckpoint(
                    epoch=epoch,
                    step=step,
                    distances=list(verdict.distances),
                    layer_distances=dict(verdict.layer_distances),
                    rank_correlation=correlation,
                    moved_fraction=moved,
                    moved_error=None if movement is None else movement.moved_error,
                    null_distance=None if null is None else null.null_distance,
                    null_error=None if null is None else null.null_error,
                    train_loss=train_loss,
                    seconds=seconds,
                    check_seconds=0.0,
                    peak_bytes=peak_bytes,
                )
            )
        spent = time.perf_counter() - began
        for bird in birds:
            bird.checkpoints[-1]["check_seconds"] = spent
            self._keep(bird, epoch, step)
        self.looks += 1
        return [{"target_sparsity": bird.sparsity, **bird.checkpoints[-1]} for bird in birds]

    def ending(self) -> str:
        """That the epochs are over, and whether they were too few for any verdict."""
        settings, least = self._settings, self._birds[0].least_checks
        over = f"{settings.max_epochs} epochs are over after {self.looks} checks"
        return over if self.looks >= least else f"{over}, and the criterion needs at least {least}"

    def results(self, ending: str, training: EarlyBirdTraining) -> list[EarlyBirdResults]:
        """What was found, a result for each sparsity; `ending` is why training stopped."""
        return [bird.result(ending, training, self._settings.criterion, self._subject) for bird in self._birds]

    # ---------------------------------------------------------------- state

    def state(self) -> dict[str, Any]:
        """All that the next looks depend on beside the model, and what was seen but for the lines of `look`."""
        return {
            "looks": self.looks,
            "probe": self._probe.state_dict(),
            "ranks": None if self._ranks is None else self._ranks.state_dict(),
            "birds": [bird.state() for bird in self._birds],
        }

    def load(self, state: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
        """Go on from a state that `state` gave, with the lines of the looks before it."""
        self.looks = state["looks"]
        self._probe.load_state_dict(state["probe"])
        if self._ranks is not None:
            self._ranks.load_state_dict(state["ranks"])
        for bird, saved in zip(self._birds, state["birds"], strict=True):
            bird.load(saved, [line for line in lines if line["target_sparsity"] == bird.sparsity])

    def _keep(self, bird: _Bird, epoch: int, step: int | None) -> None:
        """The mask as a ticket file, if every one is to be kept."""
        if self._folder is None or not self._everyone.first:
            return
        self._folder.mkdir(exist_ok=True)
        told = {"criterion": self._subject.criterion, "target_sparsity": bird.sparsity, "epoch": epoch}
        metadata = {name: str(value) for name, value in told.items()}
        self._subject.ticket(bird.mask).save(
            self._folder / f"check-{self.looks:04d}-{bird.sparsity}.safetensors",
            metadata=metadata if step is None else {**metadata, "step": str(step)},
        )
