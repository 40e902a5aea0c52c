"""What users read of a search for an early-bird ticket."""

from __future__ import annotations

from typing import TypedDict

from lottery_tickets.detection import Criterion
from lottery_tickets.masks import Mask


class EarlyBirdCheckpoint(TypedDict):
    """One look at the mask.

    Attributes:
        epoch: The epoch that was being trained, or has just been: 1 for the first, 0 for the look before training.
        step: Optimizer steps so far; None under `trainer_fn`.
        distances: To each mask that is kept, the newest of them last: the fraction of the bits that differ.
        layer_distances: Parameter name to the distance to the mask before, within this tensor; empty at the first.
        rank_correlation: Spearman correlation of the magnitudes with those at the check before; None unless the
            criterion asks for it.
        moved_fraction: Share of the weights whose value is not what it was at the check before, from a sample;
            None at the first.
        moved_error: Standard error of it.
        null_distance: The distance to the mask before that the same movement would have given had it been spread
            at random over the weights of each tensor; None at the first.
        null_error: Standard error of it.
        train_loss: Mean loss over the units (tokens, labels, samples) trained on since the check before; None
            where nothing was.
        seconds: Of training since the check before.
        check_seconds: Of this check.
        peak_bytes: The most memory so far: of torch's allocations on an accelerator, else the resident memory of
            the process; None where the system does not say.
    """

    epoch: int
    step: int | None
    distances: list[float]
    layer_distances: dict[str, float]
    rank_correlation: float | None
    moved_fraction: float | None
    moved_error: float | None
    null_distance: float | None
    null_error: float | None
    train_loss: float | None
    seconds: float
    check_seconds: float
    peak_bytes: int | None


class EarlyBirdTraining(TypedDict):
    """What was trained.

    Attributes:
        steps: Optimizer steps; None under `trainer_fn`.
        skipped: Batches left out for a loss or gradient that was not finite.
        mean_loss: Over all units trained on; None if there were none.
    """

    steps: int | None
    skipped: int
    mean_loss: float | None


class EarlyBirdResults(TypedDict):
    """What `compute_early_bird_tickets` returns.

    Attributes:
        converged: Whether the mask settled while weights moved.
        convergence_epoch: The epoch at which it had, None if it did not.
        convergence_step: The same in optimizer steps; None also under `trainer_fn`.
        final_mask: The ticket: the mask at convergence, else that of the last check.
        checkpoints: Every check until then.
        method: The criterion.
        target_sparsity: Fraction of the prunable weights that the mask removes.
        training: What was trained in all.
        reason: Why it stopped, in words.
        null_distance: That of the last check: what the distance would be if the movement were random.
    """

    converged: bool
    convergence_epoch: int | None
    convergence_step: int | None
    final_mask: Mask
    checkpoints: list[EarlyBirdCheckpoint]
    method: Criterion
    target_sparsity: float
    training: EarlyBirdTraining
    reason: str
    null_distance: float | None
