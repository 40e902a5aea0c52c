"""Exact sums of magnitudes and of their squares: from counts, which add to the same in any order.

A weight is a whole number, its significand, times a power of two. So magnitudes add up as the significands of each
exponent do. For squares, weights whose magnitudes share their leading bits, exponent and all, are a cell. In it a
magnitude is `(base + rest) * 2^exponent`, so what a cell adds to a sum of squares follows from how many weights it
has, from the sum of their rests and from that of the rests' squares. All of these are integers: they add over
blocks, threads, files and ranks, and the sums of floating-point numbers that are made of them are exact.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lottery_tickets.masks import Division
from lottery_tickets.sparsity import _counting
from lottery_tickets.sparsity._blocks import Block, Pages, Weights
from lottery_tickets.sparsity._counting import LEADING, Counts, Digit

# Bits of a significand that are stored, and what an exponent's bits are above the exponent.
_STORED = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float64: 52}
_BIAS = {torch.bfloat16: 127, torch.float16: 15, torch.float32: 127, torch.float64: 1023}
# Bits of the digits of rests, whose products are added up, and of significands, which are added up themselves.
_DIGIT = 16
_HALF = 27

_Integers = npt.NDArray[Any]


@dataclass(frozen=True)
class Cells:
    """The weights of one tensor, by the leading bits of their magnitudes.

    Attributes:
        dtype: Of the weights.
        starts: The smallest magnitude of each cell as an integer with its bits, ascending.
        shifts: How many bits the magnitudes of each cell differ in.
        table: (cells, 1 + sums): how many weights, and the sums that `_sums_of` names.
    """

    dtype: torch.dtype
    starts: Counts
    shifts: Counts
    table: Counts

    @property
    def counts(self) -> Counts:
        """How many weights each cell has."""
        return self.table[:, 0]

    @cached_property
    def bases(self) -> Counts:
        """Significands of the starts, whole numbers."""
        stored = _STORED[self.dtype]
        fractions = self.starts & ((1 << stored) - 1)
        found: Counts = fractions | (np.int64(1) << stored) * (self.starts >> stored > 0)
        return found

    @cached_property
    def exponents(self) -> Counts:
        """What powers of two the significands are multiplied by."""
        stored = _STORED[self.dtype]
        found: Counts = np.maximum(self.starts >> stored, 1) - _BIAS[self.dtype] - stored
        return found

    def squares(self, power: int) -> npt.NDArray[np.float64]:
        """The sum of squares of each cell times 2^(2 power), to float64's precision."""
        bases = self.bases.astype(np.float64)
        first, second = (one.astype(np.float64) for one in self._rests())
        sums = self.counts * np.square(bases) + 2 * bases * first + second
        found: npt.NDArray[np.float64] = np.ldexp(sums, 2 * (self.exponents + power))
        return found

    def squares_from(self, cells: Sequence[int]) -> list[Fraction]:
        """The sum of squares from each of these cells on."""
        bases, (first, second) = self.bases.astype(object), self._rests()
        sums = self.counts * bases * bases + 2 * bases * first + second
        return [_scaled(sums[cell:], 2 * self.exponents[cell:]) for cell in cells]

    def _rests(self) -> tuple[_Integers, _Integers]:
        """The sum of what magnitudes have above their cell's start, and that of its squares."""
        columns: _Integers = self.table
        if _digits_of(self.dtype) > 1:  # more than 64 bits, so Python's integers
            columns = columns.astype(object)
        first = second = np.zeros(len(columns), columns.dtype)
        for column, (one, two) in enumerate(_sums_of(self.dtype), 1):
            if two is None:
                first = first + (columns[:, column] << _DIGIT * one)
            else:
                second = second + (columns[:, column] << _DIGIT * (one + two)) * (1 if one == two else 2)
        return first, second

    def refined(self, finer: Cells) -> Cells:
        """With those of the finer cells in the place of these that they are parts of."""
        first = np.searchsorted(self.starts, finer.starts, side="right") - 1
        kept = np.ones(len(self.starts), np.bool_)
        kept[first] = False
        starts = np.concatenate([self.starts[kept], finer.starts])
        order = np.argsort(starts)
        shifts = np.concatenate([self.shifts[kept], finer.shifts])[order]
        table = np.concatenate([self.table[kept], finer.table])[order]
        return Cells(self.dtype, starts[order], shifts, table)


@dataclass(frozen=True)
class Span:
    """Magnitudes [low, high], whose cells are told apart by the bits down to `shift`."""

    low: int
    high: int
    shift: int


def magnitude_sums(
    tensors: Mapping[str, torch.Tensor], *, pages: Pages | None = None, division: Division | None = None
) -> dict[str, Fraction]:
    """The sum of the magnitudes of each tensor.

    Args:
        tensors: Name to weights without NaN and inf.
        pages: What is told where weights will be read, if they lie in files.
        division: How tensors of which these are parts are spread over ranks, all of which then make this call.
    """
    tables = []
    for name, tensor in tensors.items():
        counted = division is None or name in division.counted
        tables.append(_digits_by_exponent(tensor if counted else tensor.new_empty(0), pages))
    if division is not None:
        told = division.ranks.sum(np.concatenate([np.zeros(0, np.int64), *(one.reshape(-1) for one in tables)]))
        ends = np.cumsum([one.size for one in tables])[:-1]
        tables = [part.reshape(one.shape) for one, part in zip(tables, np.split(told, ends), strict=True)]
    return {
        name: _total(tensor.dtype, table) for (name, tensor), table in zip(tensors.items(), tables, strict=True)
    }


def _digits_by_exponent(tensor: torch.Tensor, pages: Pages | None) -> Counts:
    """(digits of a significand, exponents): their sums."""
    weights, stored = Weights({"": tensor}, dtype=tensor.dtype, pages=pages), _STORED[tensor.dtype]
    digits = [(place, (1 << _HALF) - 1) for place in range(0, stored + 1, _HALF)]

    def add_up(block: Block) -> Counts:
        return np.stack([_counting.digit_sums(weights.integers(block), stored, digit) for digit in digits])

    nothing = np.zeros((len(digits), 1 << (weights.width - stored)), np.int64)
    return sum(weights.for_each(add_up), start=nothing)


def _total(dtype: torch.dtype, table: Counts) -> Fraction:
    exponents = np.maximum(np.arange(table.shape[1]), 1) - _BIAS[dtype] - _STORED[dtype]
    return sum((_scaled(row, exponents + place * _HALF) for place, row in enumerate(table)), start=Fraction(0))


def leading_span(dtype: torch.dtype) -> Span:
    """All magnitudes, by their leading bits."""
    width = 8 * dtype.itemsize - 1
    return Span(0, (1 << width) - 1, width - LEADING)


def cells_of(
    tensors: Mapping[str, torch.Tensor],
    spans: Mapping[str, Sequence[Span]],
    *,
    pages: Pages | None = None,
    division: Division | None = None,
    progress: str | None = None,
) -> dict[str, Cells]:
    """The cells of tensors inside these spans, those that hold a weight.

    Args:
        tensors: Name to weights without NaN and inf.
        spans: Name to what is looked at, ascending and apart.
        pages: What is told where weights will be read, if they lie in files.
        division: How tensors of which these are parts are spread over ranks, all of which then make this call with
            the same spans.
        progress: Name of a progress bar; None for none.
    """
    found: dict[str, Cells] = {}
    for name, tensor in tqdm(tensors.items(), desc=progress, delay=2, disable=progress is None):
        here = tensor if division is None or name in division.counted else tensor.new_empty(0)
        found[name] = _cells_here(here, spans[name], pages)
    return found if division is None else _over_ranks(found, division)


def _cells_here(tensor: torch.Tensor, spans: Sequence[Span], pages: Pages | None) -> Cells:
    """Those of this process, all spans from one pass."""
    weights = Weights({"": tensor}, dtype=tensor.dtype, pages=pages)
    sums = 1 + len(_sums_of(tensor.dtype))
    totals = [np.zeros(((span.high - span.low >> span.shift) + 1, sums), np.int64) for span in spans]
    adding = threading.Lock()

    def add(block: Block) -> None:
        for span, total in zip(spans, totals, strict=True):
            counted = _table(weights.integers(block), span, tensor.dtype)
            with adding:
                np.add(total, counted, out=total)

    weights.for_each(add)
    held = [np.flatnonzero(total[:, 0]) for total in totals]
    return Cells(
        tensor.dtype,
        np.concatenate([span.low + (one << span.shift) for span, one in zip(spans, held, strict=True)]),
        np.concatenate([np.full(len(one), span.shift) for span, one in zip(spans, held, strict=True)]),
        np.concatenate([total[one] for total, one in zip(totals, held, strict=True)]),
    )


def _table(integers: torch.Tensor, span: Span, dtype: torch.dtype) -> Counts:
    if not _sums_of(dtype):
        return _counting.leading_bits(integers, 0, 1 << LEADING)[:, None]
    digits = [_digit(place, span.shift) for place in range(_digits_of(dtype))]
    ask = (integers, span.low, span.high, span.shift)
    pairs = {
        (one, two): _counting.moments(*ask, digits[one], digits[two])
        for one, two in combinations_with_replacement(range(len(digits)), 2)
    }
    columns = [pairs[0, 0][:, 0]]
    for one, two in _sums_of(dtype):
        columns.append(pairs[one, one][:, 1] if two is None else pairs[one, two][:, 2])
    return np.stack(columns, axis=1)


def _sums_of(dtype: torch.dtype) -> list[tuple[int, int | None]]:
    """Which sums a table has: of each digit of the rest (n, None), and of each pair of them multiplied (n, m)."""
    digits = range(_digits_of(dtype))
    return [*((one, None) for one in digits), *combinations_with_replacement(digits, 2)]


def _digits_of(dtype: torch.dtype) -> int:
    """Digits of the longest rest: none where the leading bits are all there are."""
    return -(-leading_span(dtype).shift // _DIGIT)


def _digit(place: int, bits: int) -> Digit:
    """The digit at a place of a rest of so many bits."""
    width = max(0, min(_DIGIT, bits - place * _DIGIT))
    return place * _DIGIT, (1 << width) - 1


def _over_ranks(here: Mapping[str, Cells], division: Division) -> dict[str, Cells]:
    """The cells of whole tensors: those that hold a weight on any rank, their tables added up."""
    told = division.ranks.gather({name: (cells.starts, cells.shifts) for name, cells in here.items()})
    places: dict[str, tuple[Counts, Counts]] = {}
    tables = []
    for name, cells in here.items():
        starts, first = np.unique(np.concatenate([one[name][0] for one in told]), return_index=True)
        places[name] = starts, np.concatenate([one[name][1] for one in told])[first]
        table = np.zeros((len(starts), cells.table.shape[1]), np.int64)
        table[np.searchsorted(starts, cells.starts)] = cells.table
        tables.append(table.reshape(-1))
    sums = division.ranks.sum(np.concatenate(tables))
    ends = np.cumsum([table.size for table in tables])[:-1]
    return {
        name: Cells(cells.dtype, *places[name], part.reshape(-1, cells.table.shape[1]))
        for (name, cells), part in zip(here.items(), np.split(sums, ends), strict=True)
    }


def _scaled(sums: _Integers, exponents: Counts) -> Fraction:
    """`sum(sums * 2^exponents)`, exponents ascending."""
    if not len(sums):
        return Fraction(0)
    first = np.flatnonzero(np.diff(exponents, prepend=exponents[0] - 1))
    least, powers = int(exponents[0]), exponents[first].tolist()
    by_power = np.add.reduceat(sums, first).tolist()
    total = sum(int(one) << power - least for one, power in zip(by_power, powers, strict=True))
    return Fraction(total) * Fraction(2) ** least
