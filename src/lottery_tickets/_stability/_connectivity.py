"""Losses and errors on the path between two states."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from lottery_tickets._batches import BatchLoss, LossFunction, batches_of, measure_mean
from lottery_tickets._stability._batchnorm import layers_with_statistics, recompute_statistics
from lottery_tickets._stability._ends import State
from lottery_tickets._stability._path import path_between
from lottery_tickets.errors import EvaluationError
from lottery_tickets.runs import private_random_state
from lottery_tickets.training import DataOrder, described


class Curve(NamedTuple):
    """What was measured on a path; errors are None where the data has no classes."""

    alphas: list[float]
    losses: list[float]
    errors: list[float] | None


class Measuring:
    """How the points of a path are measured; see `compute_linear_mode_connectivity`.

    Raises:
        EvaluationError: Fewer than two points, or a seed that is none.
        BatchError: Data of an unknown form.
    """

    def __init__(
        self,
        dataloader: Any,
        *,
        points: int,
        recompute_batchnorm: Any,
        loss_fn: LossFunction | None,
        seed: int,
        progress: bool,
    ) -> None:
        if not isinstance(points, int) or points < 2:
            raise EvaluationError(f"points={points!r}: a path has two ends, so give an integer of at least 2.")
        if not isinstance(seed, int) or seed < 0:
            raise EvaluationError(f"seed is a non-negative integer, got {seed!r}.")
        self.alphas = [index / (points - 1) for index in range(points)]
        self.progress = progress
        self._loss_fn, self._seed = loss_fn, seed
        self._data = _SameOrder(dataloader, seed)
        self._statistics_data = self._data
        self.recomputes = recompute_batchnorm is not False
        if not isinstance(recompute_batchnorm, bool):
            self._statistics_data = _SameOrder(recompute_batchnorm, seed)

    @property
    def order(self) -> DataOrder:
        """Of the batches that are measured."""
        return self._data.order

    def configuration(self) -> dict[str, Any]:
        """What the outcome depends on, as JSON."""
        return {
            "points": len(self.alphas),
            "recompute_batchnorm": self.recomputes,
            "batches_for_batchnorm": self._statistics_data.order.length if self.recomputes else None,
            "loss_fn": described(self._loss_fn),
            "order_seed": self._seed,
        }

    def measure(self, model: nn.Module) -> BatchLoss:
        """The model as it stands, its BatchNorm statistics recomputed if that was asked for."""
        if self.recomputes:
            recompute_statistics(model, self._statistics_data.batches())
        return measure_mean(model, self._data.batches(), loss_fn=self._loss_fn)


def measure_path(
    model: nn.Module,
    state_a: State,
    state_b: State,
    measuring: Measuring,
    mask: Mapping[str, torch.Tensor] | None = None,
) -> Curve:
    """Losses and errors at every point; see `compute_linear_mode_connectivity`."""
    if measuring.recomputes:
        layers_with_statistics(model)
    found: list[BatchLoss] = []
    bar = tqdm(measuring.alphas, desc="points on the path", leave=False, delay=2, disable=not measuring.progress)
    with private_random_state(), path_between(model, state_a, state_b, mask) as path:
        for alpha in bar:
            path.go_to(alpha)
            part = measuring.measure(model)
            if not math.isfinite(part.mean):
                raise EvaluationError(
                    f"The loss at alpha={alpha:g} is {part.mean}, so the path has no height there. Look at the "
                    "states, or measure in a wider data type."
                )
            found.append(part)
    accuracies = [accuracy for part in found if (accuracy := part.accuracy) is not None]
    return Curve(
        alphas=list(measuring.alphas),
        losses=[part.mean for part in found],
        errors=[1 - accuracy for accuracy in accuracies] if len(accuracies) == len(found) else None,
    )


def barrier_of(heights: Sequence[float]) -> float:
    """The largest height over the mean of both ends."""
    return max(heights) - (heights[0] + heights[-1]) / 2


class _SameOrder:
    """Batches that come again and again in one order."""

    def __init__(self, dataloader: Any, seed: int) -> None:
        batches = batches_of(dataloader)
        self._batches = list(batches) if isinstance(batches, Iterator) else batches
        self.order = DataOrder(self._batches, seed)

    def batches(self) -> Iterable[Any]:
        """All of them, every random stream seeded before."""
        self.order.seed(0)
        return self._batches
