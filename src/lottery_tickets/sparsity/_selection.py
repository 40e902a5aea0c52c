"""Exact selection by counting: where the line is drawn, and the bits on either side of it.

The k-th smallest magnitude is found by counting bit patterns. Magnitudes order as their patterns do, so a
histogram of the leading 15 bits tells in which bin the k-th lies, and each further pass over that one bin settles
16 bits more: one pass for bf16 and fp16, two for fp32, four for fp64. For one line through many weights a shorter
way is tried first: a small sample guesses a bracket around the k-th, one pass counts below, at and above the
bracket and counts or collects what lies inside, and the counts prove the guess or refute it. Either way the answer
is exact. Where weights lie in files, every pass is a pass over a disk, and so few lines are all guessed.

Ties at the line are broken by position: tensors in their order, row-major inside a tensor, the earlier pruned
first. Blocks are counted separately, so each knows how many of its ties go, and all are packed independently.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch

from lottery_tickets.errors import SparsityError, WeightsError
from lottery_tickets.masks import Division, PackedBits, packed_size
from lottery_tickets.sparsity import _counting
from lottery_tickets.sparsity._across import Ties, agreed_dtype, locate
from lottery_tickets.sparsity._blocks import (
    Block,
    Pages,
    Reduce,
    Rescore,
    Weights,
    refuse_nan,
)
from lottery_tickets.sparsity._counting import LEADING, Bracketed, Counts, Ladder

_log = logging.getLogger(__name__)

_R = TypeVar("_R")
NanPolicy = Literal["raise", "prune"]

_DIGIT = 16
# Most histograms of 16 bits more that are counted in one pass: half a megabyte each.
_PREFIXES_A_PASS = 8
# What is counted next where there are more of them, all in one pass: two kilobytes each.
_SMALL_DIGIT = 8

# Below this many weights the sample costs more than it saves.
_BRACKET_FROM = 1 << 22
_BRACKET_BYTES = 16 << 20
# In files, each of up to so many magnitudes in a bracket is counted for itself. That takes longer than collecting
# them, and cannot run out of room however many weights tie, which would cost three passes more.
_COUNTED_UP_TO = 256
# So many lines are guessed at a time in files; each takes a few comparisons more of every weight.
_GUESSES_IN_FILES = 8
_SAMPLE_SHARE = 800
_SAMPLE_MOST = 1 << 20
# Half-width of the bracket in standard deviations of the sample's rank; runs of neighbours are not independent.
_SAMPLE_SIGMAS = 6.0


@dataclass(frozen=True)
class Line:
    """Where kept and pruned part: all below `key` go, and the first ties at it.

    Attributes:
        threshold: The magnitude at the line: the largest pruned one (0.0 if none is pruned).
        key: Its bit pattern.
        quotas: For each block, how many of its ties go.
        removed: For each tensor, how many weights go.
    """

    threshold: float
    key: int
    quotas: Counts
    removed: dict[str, int]


class Selection:
    """Counts weights, draws lines through them, and packs what lies above a line.

    Args:
        tensors: Name to a floating-point tensor on any device, any strides; data types may differ and are
            compared by value.
        rescore: Ranks a function of the weights in their place; see `Weights`.
        dtype: What scores are compared in.
        nan: "raise" refuses NaN, "prune" ranks it below everything.
        reduce: Sums an int64 array of counts over the ranks of a process group; by default there is one rank.
        division: How tensors of which these are parts are spread over ranks; lines are then drawn through the
            whole tensors, and each rank packs its parts.
        pages: What is told where weights will be read, if they lie in files.
        progress: Name of a progress bar that appears when a pass takes over two seconds; None for none.

    Raises:
        WeightsError: NaN, or a tensor that has no magnitudes to rank.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        rescore: Rescore | None = None,
        dtype: torch.dtype | None = None,
        nan: NanPolicy = "raise",
        reduce: Reduce | None = None,
        division: Division | None = None,
        pages: Pages | None = None,
        progress: str | None = None,
    ) -> None:
        if division is not None:
            reduce = division.ranks.sum
        if reduce is not None and dtype is None:
            dtype = agreed_dtype(tensors, reduce)
        self._weights = Weights(tensors, rescore=rescore, dtype=dtype, nan_first=nan == "prune", pages=pages)
        self._reduce = reduce
        self._division = division
        self._progress = progress
        # Of tensors that several ranks hold alike, one rank counts the weights and all pack them.
        counted = set(self._weights.names if division is None else division.counted)
        self._counted = [block for block in self._weights.blocks if self._weights.names[block.tensor] in counted]

    @property
    def numel(self) -> int:
        """Number of weights on this rank."""
        return self._weights.numel

    def kth_smallest(self, ranks: Sequence[int]) -> list[tuple[float, int]]:
        """The magnitudes at these ranks (1 is the smallest) and how many ties with each the rank covers.

        With `reduce` the ranks and the answer are those of all processes together.
        """
        return [(self._weights.value_of(key), ties) for key, ties in self._radix(list(ranks))]

    def keys(self, ranks: Sequence[int]) -> list[int]:
        """The bit patterns, sign dropped, of the magnitudes at these ranks."""
        return [key for key, _ in self._radix(list(ranks))]

    def lines(self, ranks: Sequence[int]) -> list[Line]:
        """Lines below which exactly `rank` weights lie, for any number of ranks from the same counts.

        Raises:
            SparsityError: More weights than there are, or a selection over several processes that says nothing
                of where their weights lie (`reduce` without `division`).
        """
        if self._reduce is not None and self._division is None:
            raise SparsityError(
                "lines() settles ties by the position of every weight, and with reduce= this process sees only "
                "its own; kth_smallest() gives the magnitude at a rank of all processes, and how many ties go."
            )
        numel = self._numel_of_all
        for rank in ranks:
            if not 0 <= rank <= numel:
                raise SparsityError(f"Cannot remove {rank} of {numel} weights.")
        drawn = sorted({rank for rank in ranks if rank > 0})
        lines = {0: self._line_below_all()}
        if guessed := self._lines_by_guess(drawn):
            _log.debug("%d weights: sampled brackets hold %d ranks", self.numel, len(drawn))
            lines |= guessed
        elif drawn:
            _log.debug("%d weights: histograms for %d ranks", self.numel, len(drawn))
            lines |= self._lines_by_radix(drawn)
        return [lines[rank] for rank in ranks]

    def bits(self, line: Line) -> dict[str, PackedBits]:
        """Packed bits of the weights above the line, by tensor: comparison and packing in one pass."""
        return self.bits_of_each([line])[0]

    def bits_of_each(self, lines: Sequence[Line]) -> list[dict[str, PackedBits]]:
        """Packed bits of the weights above each line, all in one pass."""
        weights = self._weights
        packed = [
            {name: np.empty(packed_size(tensor.numel()), np.uint8) for name, tensor in weights.tensors.items()}
            for _ in lines
        ]
        numbers = {block: number for number, block in enumerate(weights.blocks)}

        def pack_block(block: Block) -> None:
            integers = weights.integers(block)
            for line, bits in zip(lines, packed, strict=True):
                target = bits[weights.names[block.tensor]][block.start // 8 : packed_size(block.stop)]
                _counting.pack_kept(integers, line.key, line.quotas[numbers[block]], target)

        weights.for_each(pack_block, progress=self._progress, backwards=weights.in_files)
        return packed

    # ---------------------------------------------------------------- by radix

    def _lines_by_radix(self, ranks: list[int]) -> dict[int, Line]:
        keys = [key for key, _ in self._radix(ranks)]
        thresholds = [threshold for key in keys for threshold in (key - 1, key)]
        counted = self._for_each(lambda block: _counting.above(self._weights.integers(block), thresholds))
        above = np.array(counted, np.int64).reshape(-1, len(keys), 2)
        if self._division is not None:
            ties = Ties(self._weights, self._division, keys, above[:, :, 0], above[:, :, 1])
            return {
                rank: Line(self._weights.value_of(key), key, *drawn)
                for rank, key, drawn in zip(ranks, keys, ties.drawn(ranks), strict=True)
            }
        return {
            rank: self._line(rank, key, above[:, index, 0], above[:, index, 1])
            for index, (rank, key) in enumerate(zip(ranks, keys, strict=True))
        }

    def _radix(self, ranks: list[int]) -> list[tuple[int, int]]:
        """Key at each rank, and the rank among the ties at it."""
        integers = self._weights.integers
        shift = self._weights.width - LEADING
        counts = self._summed(
            lambda block: _counting.leading_bits(integers(block), shift, 1 << LEADING), (1 << LEADING,)
        )
        total, not_finite = self._over_ranks(
            np.array([counts.sum(), counts[self._weights.infinity >> shift :].sum()])
        ).tolist()
        if not_finite:
            infinity = [self._weights.infinity]
            above = self._weights.for_each(
                lambda block: _counting.above(integers(block), infinity), self._counted, progress=self._progress
            )
            self._refuse_nan(self._counted, np.array(above, np.int64).reshape(-1))
        for rank in ranks:
            if not 1 <= rank <= total:
                raise SparsityError(f"No weight has rank {rank} of {total} weights.")
        found = self._located({0: counts}, [(0, rank) for rank in ranks])
        while shift and found:
            prefixes = sorted({prefix for prefix, _ in found})
            digit = min(shift, _DIGIT) if len(prefixes) <= _PREFIXES_A_PASS else _SMALL_DIGIT
            located = self._located(self._next_digits(prefixes, shift, shift - digit), found)
            found = [
                ((prefix << digit) | value, rank)
                for (prefix, _), (value, rank) in zip(found, located, strict=True)
            ]
            shift -= digit
        return found

    def _located(
        self, histograms: Mapping[int, Counts], wanted: Sequence[tuple[int, int]]
    ) -> list[tuple[int, int]]:
        """For each histogram and rank in it, of all processes, the bin and the rank inside that."""
        if self._reduce is not None and wanted:
            return locate(histograms, wanted, self._reduce)
        return [_locate(histograms[which], rank) for which, rank in wanted]

    def _next_digits(self, prefixes: list[int], shift: int, finer: int) -> dict[int, Counts]:
        """Histogram of the next digit of the magnitudes that begin with each prefix."""
        integers = self._weights.integers
        ladder = Ladder(prefixes, self._weights.width - shift)
        lows = [prefix << shift for prefix in prefixes]
        last = (1 << shift) - 1

        def count(block: Block) -> Counts:
            if len(prefixes) <= _PREFIXES_A_PASS:
                found = integers(block)
                return np.stack([_counting.bits_inside(found, low, low + last, finer) for low in lows])
            return _counting.bits_by_prefix(integers(block), ladder, shift, finer)

        counts = self._summed(count, (len(prefixes), 1 << (shift - finer)))
        return dict(zip(prefixes, counts, strict=True))

    # ---------------------------------------------------------------- by guess

    def _lines_by_guess(self, ranks: list[int]) -> dict[int, Line] | None:
        """The lines, if a sample's guesses hold; None if one does not or they are not worth their cost."""
        if not 1 <= len(ranks) <= (_GUESSES_IN_FILES if self._weights.in_files else 1):
            return None
        brackets = self._guess_brackets(ranks)
        if brackets is None:
            return None
        widest = max(high - low for low, high in brackets)
        if self._weights.in_files and widest < _COUNTED_UP_TO:
            return self._count_inside(ranks, brackets)
        return self._collect_inside(ranks, brackets)

    def _count_inside(self, ranks: list[int], brackets: list[tuple[int, int]]) -> dict[int, Line] | None:
        """Lines in brackets so narrow that every magnitude inside is counted for itself."""
        weights = self._weights
        edges = [edge for low, high in brackets for edge in (low - 1, high)]

        def count(block: Block) -> tuple[Counts, list[Counts]]:
            integers = weights.integers(block)
            outside = _counting.above(integers, [*edges, weights.infinity])
            return outside, [_counting.bits_inside(integers, low, high, 0) for low, high in brackets]

        counted = self._for_each(count)
        above = np.stack([outside for outside, _ in counted])
        self._refuse_nan(self._weights.blocks, above[:, -1])
        lines = {}
        for index, (rank, (low, _)) in enumerate(zip(ranks, brackets, strict=True)):
            inside = np.stack([bins[index] for _, bins in counted])
            above_low, above_high = above[:, 2 * index], above[:, 2 * index + 1]
            wanted = rank - (self.numel - int(above_low.sum()))
            if not 0 < wanted <= inside.sum():
                return None
            place, _ = _locate(inside.sum(axis=0), wanted)
            above_key = above_high + inside[:, place + 1 :].sum(axis=1)
            lines[rank] = self._line(rank, low + place, above_key + inside[:, place], above_key)
        return lines

    def _collect_inside(self, ranks: list[int], brackets: list[tuple[int, int]]) -> dict[int, Line] | None:
        """Lines in brackets whose insides are kept until the end."""
        weights = self._weights
        stored = _Budget(_BRACKET_BYTES // weights.dtype.itemsize)

        def count(block: Block) -> list[Bracketed]:
            if stored.spent:
                return []
            integers = weights.integers(block)
            counted = [_counting.bracket(integers, low, high, weights.infinity) for low, high in brackets]
            stored.spend(sum(found.inside.size for found in counted))
            return counted

        counted = self._for_each(count)
        if stored.spent:
            return None
        lines = {}
        for rank, (low, high), found in zip(ranks, brackets, zip(*counted, strict=True), strict=True):
            line = self._line_in_bracket(rank, low, high, found)
            if line is None:
                return None
            lines[rank] = line
        return lines

    def _line_in_bracket(self, rank: int, low: int, high: int, counted: Sequence[Bracketed]) -> Line | None:
        from_low, above_low, from_high, above_high, above_top = np.stack([found.around for found in counted]).T
        self._refuse_nan(self._weights.blocks, above_top)
        below_low, upto_low, below_high, upto_high = (
            self.numel - int(count.sum()) for count in (from_low, above_low, from_high, above_high)
        )
        if below_low < rank <= upto_low:
            return self._line(rank, low, from_low, above_low)
        if upto_low < rank <= below_high:
            inside = [found.inside for found in counted]
            key = int(np.partition(np.concatenate(inside), rank - upto_low - 1)[rank - upto_low - 1])
            above = from_high + np.array([np.count_nonzero(found > key) for found in inside])
            ties = np.array([np.count_nonzero(found == key) for found in inside])
            return self._line(rank, key, above + ties, above)
        if below_high < rank <= upto_high:
            return self._line(rank, high, from_high, above_high)
        return None

    def _guess_brackets(self, ranks: Sequence[int]) -> list[tuple[int, int]] | None:
        if self._reduce is not None or self.numel < _BRACKET_FROM:
            return None
        sampled = self._weights.sample(min(self.numel // _SAMPLE_SHARE, _SAMPLE_MOST))
        if sampled is None:
            return None
        sample = torch.cat(sampled).numpy()
        sample = sample & np.iinfo(sample.dtype).max
        places = []
        for rank in ranks:
            share = rank / self.numel
            middle = share * sample.size
            spread = _SAMPLE_SIGMAS * (sample.size * share * (1 - share)) ** 0.5 + 1
            places.append((max(0, int(middle - spread)), min(sample.size - 1, int(middle + spread))))
        parted = np.partition(sample, sorted({place for pair in places for place in pair}))
        return [(int(parted[first]), int(parted[last])) for first, last in places]

    # ---------------------------------------------------------------- shared

    def _for_each(self, work: Callable[[Block], _R]) -> list[_R]:
        return self._weights.for_each(work, progress=self._progress)

    @property
    def _numel_of_all(self) -> int:
        """Number of weights of the whole tensors."""
        if self._division is None:
            return self.numel
        return sum(self._division.shards[name].shape.numel() for name in self._weights.names)

    def _over_ranks(self, counts: Counts) -> Counts:
        return counts if self._reduce is None else self._reduce(counts)

    def _summed(self, count: Callable[[Block], Counts], shape: tuple[int, ...]) -> Counts:
        """Sum of the counts over this process's blocks; integers add to the same sum in any order."""
        total = np.zeros(shape, np.int64)
        lock = threading.Lock()

        def add(block: Block) -> None:
            counts = count(block)
            with lock:
                np.add(total, counts, out=total)

        self._weights.for_each(add, self._counted, progress=self._progress)
        return total

    def _line(self, rank: int, key: int, from_key: Counts, above_key: Counts) -> Line:
        """The line through the ties at `key`, from each block's counts of weights at or above and above it."""
        ties = from_key - above_key
        wanted = rank - (self.numel - int(from_key.sum()))
        quotas = np.clip(wanted - (np.cumsum(ties) - ties), 0, ties)
        sizes = np.array([block.stop - block.start for block in self._weights.blocks], np.int64)
        return Line(self._weights.value_of(key), key, quotas, self._by_tensor(sizes - from_key + quotas))

    def _line_below_all(self) -> Line:
        nothing = np.zeros(len(self._weights.blocks), np.int64)
        return Line(0.0, 0, nothing, self._by_tensor(nothing))

    def _by_tensor(self, numbers: Counts) -> dict[str, int]:
        return self._totals(self._weights.blocks, numbers)

    def _totals(self, blocks: Sequence[Block], numbers: Counts) -> dict[str, int]:
        totals = dict.fromkeys(self._weights.names, 0)
        for block, number in zip(blocks, numbers.tolist(), strict=True):
            totals[self._weights.names[block.tensor]] += number
        return totals

    def _refuse_nan(self, blocks: Sequence[Block], counts: Counts) -> None:
        """Every rank comes here or none does, so all stop together: one that went on would wait for the others."""
        found = self._totals(blocks, counts)
        if self._division is not None:
            found = dict(zip(found, self._over_ranks(np.array(list(found.values()))).tolist(), strict=True))
            refuse_nan(found)
            return
        everywhere = int(self._over_ranks(counts.sum(keepdims=True)).sum())
        refuse_nan(found)
        if everywhere:
            raise WeightsError(f"NaN has no rank among magnitudes; {everywhere} found on another rank.")


class _Budget:
    """How many more magnitudes may be stored; spending from many threads at once is safe."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._lock = threading.Lock()

    def spend(self, size: int) -> None:
        with self._lock:
            self._left -= size

    @property
    def spent(self) -> bool:
        return self._left < 0


def _locate(counts: Counts, rank: int) -> tuple[int, int]:
    """The bin that holds the rank-th, counting from 1, and its rank inside that bin."""
    totals = np.cumsum(counts)
    found = int(np.searchsorted(totals, rank))
    return found, rank - int(totals[found] - counts[found])
