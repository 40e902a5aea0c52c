"""Lines through weights that several ranks hold in parts: what is counted where, and what they tell each other.

Counts stay on their rank; of a histogram a few sums of bins are added up over the ranks at a time, each time over
a finer part of it, until one bin is left. Ties at the line are broken by their place in the whole tensor: how many
each tensor loses follows from how many all ranks have of it, and in the one tensor whose ties go in part, the
place where the last of them lies is searched for in the same way. So what is told is a few kilobytes, however
large the model and however its tensors are cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from lottery_tickets.masks import Division
from lottery_tickets.sparsity import _counting
from lottery_tickets.sparsity._blocks import INTEGERS, Block, Reduce, Weights, common_dtype, rankable
from lottery_tickets.sparsity._counting import Counts

# Sums of bins, or counts up to a place, that are told at a time; a power of two.
_AT_A_TIME = 32


class Drawn(NamedTuple):
    """One line among the ranks: for each block, how many of its ties go; for each tensor, how many weights go."""

    quotas: Counts
    removed: dict[str, int]


def agreed_dtype(tensors: Mapping[str, torch.Tensor], reduce: Reduce) -> torch.dtype:
    """What the weights of all ranks are compared in: a rank may hold none, or not of every type."""
    numels = dict.fromkeys(INTEGERS, 0)
    for tensor in rankable(tensors).values():
        numels[tensor.dtype] += tensor.numel()
    held = reduce(np.array(list(numels.values()), np.int64))
    return common_dtype(dtype for dtype, numel in zip(numels, held, strict=True) if numel)


def locate(
    histograms: Mapping[int, Counts], wanted: Sequence[tuple[int, int]], reduce: Reduce
) -> list[tuple[int, int]]:
    """The bin that holds a rank (from 1) of all ranks' histograms together, and its rank inside that bin.

    Args:
        histograms: Of this rank, each with the same power of two of bins.
        wanted: Which histogram, and the rank in it.
        reduce: Sums an array over the ranks.
    """
    bins = next(iter(histograms.values())).size
    sums = {which: np.concatenate(([0], np.cumsum(counts))) for which, counts in histograms.items()}
    low, left = np.zeros(len(wanted), np.int64), np.array([rank for _, rank in wanted], np.int64)
    every, width = np.arange(len(wanted)), bins
    while width > 1:
        finer = max(1, width // _AT_A_TIME)
        edges = low[:, None] + np.arange(0, width + 1, finer)
        here = [np.diff(sums[which][row]) for (which, _), row in zip(wanted, edges, strict=True)]
        upto = np.cumsum(reduce(np.stack(here)), axis=1)
        place = (upto < left[:, None]).sum(axis=1)
        left -= np.where(place > 0, upto[every, place - 1], 0)
        low, width = low + place * finer, finer
    return list(zip(low.tolist(), left.tolist(), strict=True))


@dataclass(frozen=True)
class Ties:
    """Weights at lines, in parts of tensors.

    Attributes:
        weights: Of this rank.
        division: How they are spread.
        keys: Of the lines.
        from_key: For each block and line, how many weights lie at the line or above it.
        above_key: How many lie above it.
    """

    weights: Weights
    division: Division
    keys: Sequence[int]
    from_key: Counts
    above_key: Counts

    def drawn(self, ranks: Sequence[int]) -> list[Drawn]:
        """The lines at these ranks of all weights of all ranks, one for each key."""
        names = self.weights.names
        numels = np.array([self.division.shards[name].shape.numel() for name in names], np.int64)
        here = np.stack([self._by_tensor(self.from_key), self._by_tensor(self.from_key - self.above_key)])
        counted = here * self._counted[:, None]
        from_key, ties = self.division.ranks.sum(counted)
        wanted = np.array(ranks) - (numels.sum() - from_key.sum(axis=0))
        quotas = np.clip(wanted - (np.cumsum(ties, axis=0) - ties), 0, ties)
        mine = np.where(quotas == ties, here[1], 0)
        parted = np.argwhere((quotas > 0) & (quotas < ties))
        mine[tuple(parted.T)] = self._before_the_last(parted, quotas[tuple(parted.T)], numels)
        removed = numels[:, None] - from_key + quotas
        blocks = self._by_block(mine)
        return [
            Drawn(blocks[:, line], dict(zip(names, removed[:, line].tolist(), strict=True)))
            for line in range(len(self.keys))
        ]

    def _before_the_last(self, parted: Counts, quotas: Counts, numels: Counts) -> Counts:
        """How many ties this rank loses where `quotas` go of all: of each pair (tensor, line), the first ones.

        For each pair, fewer ties than go lie before the place `low`, and as many or more before `high`.
        """
        low, high = np.zeros(len(parted), np.int64), numels[parted[:, 0]]
        while (high - low > 1).any():
            steps = -(-(high - low) // _AT_A_TIME)
            places = np.minimum(low[:, None] + steps[:, None] * np.arange(1, _AT_A_TIME + 1), high[:, None])
            here = [
                [self._ties_before(tensor, line, place) if self._counted[tensor] else 0 for place in row]
                for (tensor, line), row in zip(parted.tolist(), places.tolist(), strict=True)
            ]
            counts = self.division.ranks.sum(np.array(here, np.int64))
            found = (counts < quotas[:, None]).sum(axis=1)
            every = np.arange(len(parted))
            low = np.where(found > 0, places[every, found - 1], low)
            high = places[every, found]
        return np.array(
            [
                self._ties_before(tensor, line, place)
                for (tensor, line), place in zip(parted.tolist(), high.tolist(), strict=True)
            ],
            np.int64,
        )

    def _ties_before(self, tensor: int, line: int, place: int) -> int:
        """How many of this rank's ties lie before a place of the whole tensor."""
        stop = self.division.shards[self.weights.names[tensor]].before(place)
        first, last = np.searchsorted(self._tensors, [tensor, tensor + 1]).tolist()
        whole = first + sum(block.stop <= stop for block in self.weights.blocks[first:last])
        count = int((self.from_key[first:whole, line] - self.above_key[first:whole, line]).sum())
        if whole < last and (start := self.weights.blocks[whole].start) < stop:
            part, key = self.weights.integers(Block(tensor, start, stop)), self.keys[line]
            from_key, above_key = _counting.above(part, [key - 1, key]).tolist()
            count += from_key - above_key
        return count

    def _by_tensor(self, counts: Counts) -> Counts:
        totals = np.zeros((len(self.weights.names), len(self.keys)), np.int64)
        np.add.at(totals, self._tensors, counts)
        return totals

    def _by_block(self, quotas: Counts) -> Counts:
        """Each tensor's number, its first blocks first."""
        ties = self.from_key - self.above_key
        ended = np.cumsum(ties, axis=0) - ties
        # What came before a tensor's own first block does not count.
        tensors = self._tensors
        firsts = np.searchsorted(tensors, tensors)
        split: Counts = np.clip(quotas[tensors] - (ended - ended[firsts]), 0, ties)
        return split

    @cached_property
    def _tensors(self) -> Counts:
        return np.array([block.tensor for block in self.weights.blocks], np.int64)

    @cached_property
    def _counted(self) -> Counts:
        return np.array([name in self.division.counted for name in self.weights.names], np.int64)
