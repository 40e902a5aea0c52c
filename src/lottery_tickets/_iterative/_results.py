"""What users read of iterative pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypedDict

import torch

from lottery_tickets.masks import Mask
from lottery_tickets.training import Evaluation

Rewind = Literal["weights", "learning_rate", "none"]


class PruningRound(TypedDict):
    """A network of one sparsity, trained.

    Attributes:
        round: 0 for the dense network, then 1, 2 and so on.
        sparsity: Fraction of the prunable weights that was zero from its first step to its last.
        layer_sparsities: Parameter name to the same within it.
        mask_digest: Of its mask; None for the dense network.
        steps: Batches it was trained on, counted from the rewinding point; None under `trainer_fn`.
        skipped: Batches left out for a loss or gradient that was not finite.
        train_loss: Mean over the last epoch; under `trainer_fn` what that returned, if it was a number.
        eval_loss: Mean over the evaluation data at the end; None without any.
        accuracy: Share of the evaluation data's labels that are right at the end; None where there are no classes.
        early_stopping_step: Where the evaluation loss was least, in steps from the beginning of training; None
            without evaluation data and under `trainer_fn`.
        early_stopping_loss: That least loss.
        early_stopping_accuracy: The accuracy there.
        test_loss: Mean over the test data at the end; None without any.
        test_accuracy: Share of its labels that are right at the end.
        early_stopping_test_loss: Mean over the test data at the early-stopping step.
        early_stopping_test_accuracy: Share of its labels that are right there.
        evaluations: Every evaluation on the way.
        seconds: Of training, evaluations included.
    """

    round: int
    sparsity: float
    layer_sparsities: dict[str, float]
    mask_digest: str | None
    steps: int | None
    skipped: int
    train_loss: float | None
    eval_loss: float | None
    accuracy: float | None
    early_stopping_step: int | None
    early_stopping_loss: float | None
    early_stopping_accuracy: float | None
    test_loss: float | None
    test_accuracy: float | None
    early_stopping_test_loss: float | None
    early_stopping_test_accuracy: float | None
    evaluations: list[Evaluation]
    seconds: float


class IterativePruningResults(TypedDict):
    """What `compute_iterative_magnitude_pruning` returns.

    Attributes:
        method: "iterative_magnitude_pruning", with "magnitude" replaced by the name of another criterion.
        rewind: What was put back after each round.
        target_sparsity: Fraction of the prunable weights that the last mask removes.
        rewind_epoch: Where that was taken, in epochs; 0 if it was given in steps.
        rewind_step: The same in steps; None under `trainer_fn`.
        dense: The network before anything was pruned.
        iterations: The network of each round's mask, trained.
        final_mask: The ticket of the last round.
        rewind_state: The weights and buffers the tickets are meant for, taken at the rewinding point: named
            tensors (of a model in parts DTensors), or with `run_dir` the path of a safetensors file of them.
    """

    method: str
    rewind: Rewind
    target_sparsity: float
    rewind_epoch: int
    rewind_step: int | None
    dense: PruningRound
    iterations: list[PruningRound]
    final_mask: Mask
    rewind_state: Mapping[str, torch.Tensor] | str
