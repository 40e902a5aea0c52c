"""LAMP: layers made comparable by what a weight's square is of the squares that are not smaller, in its layer.

Sorted ascending inside its layer, weight u scores `w_u^2 / (w_u^2 + w_(u+1)^2 + ...)`, and the smallest scores of
all layers go. A score is the exact quotient of exact sums, rounded once, so it hangs neither on the order of sums
nor on where the weights lie. Scores rise as the weights do: a layer loses its smallest weights, and only their
number is to be found.

That takes no sorting. The weights of each layer are counted by their leading bits; between which scores those of a
cell lie follows from its ends and from the sum of squares above it. Counting how many weights lie surely below and
possibly below these scores encloses the score at the cut, and the few cells in which it may lie are counted again
by more bits, until each is one magnitude. Scores of equal magnitudes follow from how many there are.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.errors import SparsityError
from lottery_tickets.masks import Division
from lottery_tickets.sparsity._blocks import Pages
from lottery_tickets.sparsity._moments import Cells, Span, cells_of, leading_span

_Floats = npt.NDArray[np.float64]

# Bits by which cells are told apart that are counted again.
_DIGIT = 8
# Ends are computed in float64, each way a little too far: more than rounding can make, less than what two
# neighbours in float32 differ by. Scores too small for that are taken for any small ones.
_SLACK = 1e-9
_LEAST = 1e-290


class _Ends(NamedTuple):
    """Of each cell of a layer: its scores lie in [low, high], and so many weights may go."""

    low: _Floats
    high: _Floats
    counts: npt.NDArray[np.int64]


class _Enclosure(NamedTuple):
    """The score at a cut lies in [low, high]; `removed` scores lie below the cut or at it."""

    low: float
    high: float
    removed: int


def lamp_removals(
    tensors: Mapping[str, torch.Tensor],
    removals: Sequence[int],
    *,
    pages: Pages | None = None,
    division: Division | None = None,
    progress: str | None = None,
) -> list[dict[str, int]]:
    """How many weights each tensor loses by LAMP scores, for each number to remove in all.

    A tensor's largest weight scores 1 and is never removed. Equal scores go by position of the tensor, as weights
    do. More removals give each tensor no fewer.

    Args:
        tensors: Name to weights without NaN and inf.
        removals: How many weights go in all, once or several times.
        pages: What is told where weights will be read, if they lie in files.
        division: How tensors of which these are parts are spread over ranks, all of which then make this call.
        progress: Name of a progress bar; None for none.

    Raises:
        SparsityError: More is to go than leaves each tensor one weight.
    """
    shapes = {name: one.shape for name, one in tensors.items()} if division is None else division.shapes
    numels = {name: shapes[name].numel() for name in tensors}
    most = sum(max(numel - 1, 0) for numel in numels.values())
    for removed in removals:
        if removed > most:
            raise SparsityError(
                f"Cannot remove {removed} of {sum(numels.values())} weights: every tensor keeps at least 1, so at "
                f"most {most} can go. Lower the sparsity, or leave small tensors out."
            )
    wanted = sorted({removed for removed in removals if removed})
    nothing = dict.fromkeys(numels, 0)
    if not wanted:
        return [dict(nothing) for _ in removals]
    ranked = {name: tensor for name, tensor in tensors.items() if numels[name] > 1}
    spans = {name: [leading_span(tensor.dtype)] for name, tensor in ranked.items()}
    cells = cells_of(ranked, spans, pages=pages, division=division, progress=progress)
    while True:
        ends = {name: _ends_of(one) for name, one in cells.items()}
        enclosures = _enclose(list(ends.values()), wanted)
        spans = {name: found for name, one in cells.items() if (found := _wide(one, ends[name], enclosures))}
        if not spans:
            break
        again = {name: ranked[name] for name in spans}
        finer = cells_of(again, spans, pages=pages, division=division, progress=progress)
        cells |= {name: cells[name].refined(one) for name, one in finer.items()}
    runs = [_runs(cells[name], ends[name], enclosures) for name in ranked]
    lost = {
        enclosure.removed: dict(zip(ranked, _cut(enclosure, [layer[turn] for layer in runs]), strict=True))
        for turn, enclosure in enumerate(enclosures)
    }
    return [nothing | lost.get(removed, {}) for removed in removals]


def _ends_of(cells: Cells) -> _Ends:
    """Where the scores of each cell lie, and how many weights of it may go: all but the largest of the layer."""
    # A power of two multiplies exactly; without it squares of float64 could leave its range.
    power = -int(cells.exponents[-1]) - int(cells.bases[-1]).bit_length()
    powers = cells.exponents + power
    smallest = np.ldexp(cells.bases.astype(np.float64), powers)
    largest = np.ldexp((cells.bases + (np.int64(1) << cells.shifts) - 1).astype(np.float64), powers)
    from_here = np.cumsum(cells.squares(power)[::-1])[::-1]
    above = np.append(from_here[1:], 0.0)
    below, upto = np.square(smallest), np.square(largest)
    low = np.divide(below, from_here, out=np.zeros_like(below), where=from_here > 0)
    high = np.divide(upto, above + upto, out=np.zeros_like(upto), where=above + upto > 0)
    counts = cells.counts.copy()
    counts[-1] -= 1
    return _Ends(low * (1 - _SLACK), high * (1 + _SLACK) + _LEAST, counts)


def _enclose(layers: Sequence[_Ends], removals: Sequence[int]) -> list[_Enclosure]:
    """The narrowest bounds of each cut that the cells' ends tell."""
    every = _Ends(*(np.concatenate(one) for one in zip(*layers, strict=True)))
    edges = []
    for side in (every.low, every.high):
        order = np.argsort(side, kind="stable")
        # Up to an end so many may lie at most, by the low ones, or lie at least, by the high ones.
        places = np.searchsorted(np.cumsum(every.counts[order]), removals)
        edges.append(side[order][places].tolist())
    return [_Enclosure(*both) for both in zip(*edges, removals, strict=True)]


def _inside(ends: _Ends, enclosure: _Enclosure) -> slice:
    """The cells that may have scores between the bounds; they lie side by side."""
    first = int(np.searchsorted(ends.high, enclosure.low))
    return slice(first, max(first, int(np.searchsorted(ends.low, enclosure.high, side="right"))))


def _wide(cells: Cells, ends: _Ends, enclosures: Sequence[_Enclosure]) -> list[Span]:
    """Where a layer has to be counted by more bits: cells of many magnitudes, those side by side as one."""
    chosen = np.zeros(len(cells.starts), np.bool_)
    for enclosure in enclosures:
        chosen[_inside(ends, enclosure)] = True
    chosen &= cells.shifts > 0
    starts, shifts = cells.starts[chosen], cells.shifts[chosen]
    if not len(starts):
        return []
    lasts = starts + (np.int64(1) << shifts) - 1
    breaks = np.flatnonzero((starts[1:] != lasts[:-1] + 1) | (shifts[1:] != shifts[:-1])) + 1
    return [
        Span(int(run[0]), int(end[-1]), max(0, int(shift[0]) - _DIGIT))
        for run, end, shift in zip(*(np.split(one, breaks) for one in (starts, lasts, shifts)), strict=True)
    ]


class _Run:
    """Weights of one layer, the smallest first, whose scores may be the one at a cut.

    Args:
        below: How many weights of the layer have smaller scores.
        squares: Of each magnitude, ascending.
        counts: How many weights of each may go.
        stay: How many of the largest magnitude may not.
        above: The sum of squares of all magnitudes above these.
    """

    def __init__(
        self, below: int, squares: Sequence[Fraction], counts: Sequence[int], stay: int, above: Fraction
    ) -> None:
        self.below = below
        self._ends = np.cumsum(counts).tolist()
        # Whole numbers: a quotient of two is rounded once.
        unit = math.lcm(above.denominator, *(one.denominator for one in squares))
        self._squares = [int(one * unit) for one in squares]
        # What lies above each magnitude, and with it those of the magnitude that stay.
        self._above = [0] * len(squares)
        total = int(above * unit) + (stay * self._squares[-1] if squares else 0)
        for place in range(len(squares) - 1, -1, -1):
            self._above[place] = total
            total += counts[place] * self._squares[place]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def score(self, weight: int) -> float:
        """That of a weight of the run."""
        place = bisect_right(self._ends, weight)
        square = self._squares[place]
        return square / (self._above[place] + (self._ends[place] - weight) * square) if square else 0.0


def _runs(cells: Cells, ends: _Ends, enclosures: Sequence[_Enclosure]) -> list[_Run]:
    """A layer's part in each enclosure."""
    inside = [_inside(ends, enclosure) for enclosure in enclosures]
    sums = cells.squares_from([one.stop for one in inside])
    squares = {}
    for one in inside:
        for cell in range(one.start, one.stop):
            squares[cell] = (Fraction(int(cells.bases[cell])) * Fraction(2) ** int(cells.exponents[cell])) ** 2
    before = np.cumsum(ends.counts) - ends.counts
    return [
        _Run(
            int(before[one.start]) if one.start < len(before) else int(ends.counts.sum()),
            [squares[cell] for cell in range(one.start, one.stop)],
            ends.counts[one].tolist(),
            int(one.stop == len(before) and one.start < one.stop),
            above,
        )
        for one, above in zip(inside, sums, strict=True)
    ]


def _cut(enclosure: _Enclosure, layers: Sequence[_Run]) -> list[int]:
    """How many each layer loses: all below the score at the cut, and of those equal to it the first layers'."""
    wanted = enclosure.removed - sum(layer.below for layer in layers)
    # The smallest number up to which as many scores as wanted lie, among the patterns of floating-point numbers.
    low, high = _pattern(enclosure.low) - 1, _pattern(enclosure.high)
    least, most = [0] * len(layers), [len(layer) for layer in layers]
    while high - low > 1:
        middle = (low + high) // 2
        upto = [
            bisect_right(range(len(layer)), _number(middle), one, other, key=layer.score)
            for layer, one, other in zip(layers, least, most, strict=True)
        ]
        if sum(upto) >= wanted:
            high, most = middle, upto
        else:
            low, least = middle, upto
    lost = [bisect_left(range(len(layer)), _number(high), key=layer.score) for layer in layers]
    left = wanted - sum(lost)
    for turn, (layer, under) in enumerate(zip(layers, lost, strict=True)):
        ties = min(left, bisect_right(range(len(layer)), _number(high), key=layer.score) - under)
        lost[turn] = layer.below + under + ties
        left -= ties
    return lost


def _pattern(number: float) -> int:
    """The bits of a number that is not negative, which order as the numbers do."""
    found: Any = struct.unpack("<q", struct.pack("<d", number))[0]
    return int(found)


def _number(pattern: int) -> float:
    found: Any = struct.unpack("<d", struct.pack("<q", pattern))[0]
    return float(found)
