"""Spearman's correlation of magnitudes between two checks, from 256 ranks a weight and a table of counts."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.detection._shapes import checked, shapes_of
from lottery_tickets.errors import DetectionError
from lottery_tickets.sparsity import Block, Ladder, Selection, Weights, count_pairs, for_each, rank_among

BUCKETS = 256

_Counts = npt.NDArray[np.int64]


class RanksState(TypedDict):
    """Everything that `MagnitudeRanks` knows.

    Attributes:
        tensors: Parameter name to the bucket of each weight at the last check, uint8, flat; empty before the
            first.
    """

    tensors: dict[str, torch.Tensor]


class MagnitudeRanks:
    """Rank correlation of magnitudes with the check before, at one byte a weight.

    The magnitudes of all tensors together are cut into 256 buckets at their exact quantiles: bucket b holds those
    above the magnitude of rank ceil(b N / 256) and up to that of rank ceil((b + 1) N / 256), so equal magnitudes
    always share one. Buckets of the check before and of this one make a 256 x 256 table of counts, and the
    correlation is Pearson's on the mean ranks of the buckets: Spearman's with ties corrected, of the bucketed
    magnitudes. Nothing is sorted; memory beyond the byte a weight does not grow with the model.

    Args:
        tensors: Parameter name to weights; they say which names and shapes to expect, and are not looked at.

    Raises:
        WeightsError: A tensor that has no magnitudes to rank.

    Example:
        >>> import torch
        >>> from lottery_tickets.detection import MagnitudeRanks
        >>> weights = {"w": torch.arange(1024.0)}
        >>> ranks = MagnitudeRanks(weights)
        >>> ranks.update(weights), ranks.update(weights), ranks.update({"w": weights["w"].flip(0)})
        (None, 1.0, -1.0)

    References:
        Spearman, "The Proof and Measurement of Association between Two Things", American Journal of Psychology
        15(1), 1904. Kendall, "Rank Correlation Methods", 1948, chapter 3 (ties).
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._shapes = shapes_of(tensors)
        self._buckets: dict[str, torch.Tensor] | None = None

    def update(self, tensors: Mapping[str, torch.Tensor]) -> float | None:
        """Correlation with the check before; this check takes its place.

        Args:
            tensors: Weights by the same names and in the same shapes as before, on any device.

        Returns:
            The correlation in [-1, 1]; None at the first check, and where all magnitudes of a check rank alike,
            for which no correlation is defined.

        Raises:
            WeightsError: NaN, or other tensors than before.
        """
        weights = Weights(checked(tensors, self._shapes))
        edges = _edges(weights)
        first = self._buckets is None
        buckets = self._buckets or {
            name: torch.empty(shape.numel(), dtype=torch.uint8) for name, shape in self._shapes.items()
        }
        table = np.zeros((BUCKETS, BUCKETS), np.int64)
        adding = threading.Lock()

        def rank(block: Block) -> None:
            kept = buckets[weights.names[block.tensor]].numpy()[block.start : block.stop]
            fresh = rank_among(weights.integers(block), edges)
            if not first:
                counts = count_pairs(kept, fresh)
                with adding:
                    np.add(table, counts, out=table)
            kept[:] = fresh

        for_each(rank, weights.blocks)
        self._buckets = buckets
        return None if first else correlation_of(table)

    def state_dict(self) -> RanksState:
        """The buckets of the last check, not copied."""
        return RanksState(tensors=dict(self._buckets or {}))

    def load_state_dict(self, state: RanksState) -> None:
        """Go on where another one stopped.

        Args:
            state: What `state_dict` gave, saved and loaded perhaps.

        Raises:
            DetectionError: Buckets of other tensors.
        """
        tensors = state["tensors"]
        expected = {name: (shape.numel(), torch.uint8) for name, shape in self._shapes.items()} if tensors else {}
        found = {name: (tensor.numel(), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            strange = sorted(
                name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
            )
            raise DetectionError(
                f"The saved ranks are not those of these tensors: {', '.join(strange)}; expected a flat uint8 "
                "tensor for each. Start anew for another model."
            )
        self._buckets = {name: tensors[name].clone() for name in self._shapes} if tensors else None


def correlation_of(table: _Counts) -> float | None:
    """Pearson's correlation of the mean ranks of a table's rows and columns; None where a side has but one rank.

    Twice a mean rank less its mean is a whole number, 2 (weights before) + (weights here) - N; sums are rounded
    once, so the figure does not depend on the order of the counts.
    """
    rows, columns = table.sum(axis=1), table.sum(axis=0)
    row_ranks, column_ranks = _centred_ranks(rows), _centred_ranks(columns)
    spread = _sum(rows * (row_ranks * row_ranks)) * _sum(columns * (column_ranks * column_ranks))
    if not spread:
        return None
    common = _sum(table * (row_ranks[:, None] * column_ranks[None, :]))
    return max(-1.0, min(1.0, common / math.sqrt(spread)))


def _centred_ranks(counts: _Counts) -> npt.NDArray[np.float64]:
    ranks: npt.NDArray[np.float64] = (2 * (np.cumsum(counts) - counts) + counts - counts.sum()).astype(np.float64)
    return ranks


def _sum(products: npt.NDArray[np.float64]) -> float:
    return math.fsum(products.reshape(-1).tolist())


def _edges(weights: Weights) -> Ladder:
    """Keys of the 255 magnitudes that end the buckets before the last."""
    ranks = [-(-weights.numel * bucket // BUCKETS) for bucket in range(1, BUCKETS)] if weights.numel else []
    return Ladder(Selection(weights.tensors).keys(ranks), weights.width)
