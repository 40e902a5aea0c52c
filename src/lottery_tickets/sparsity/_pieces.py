"""Rows and N:M groups of a tensor that several ranks hold in parts, whole ones and cut ones.

What lies whole on a rank is settled there. Of rows that are cut, every rank counts its own weights below a line of
each row, and the lines are searched for all at once: a few bytes a row are told for every bit of a weight. Of
groups that are cut, the members are told: as many weights a row as there are cuts, times the group's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.masks import Division, PackedBits, Shard, pack, runs_of, unpack
from lottery_tickets.sparsity._blocks import MakeWeights, block_size
from lottery_tickets.sparsity._counting import Counts
from lottery_tickets.sparsity._layouts import Layout
from lottery_tickets.sparsity._patterns import NMPattern, bits_by_pattern, strongest
from lottery_tickets.sparsity._rows import decide_rows, quotas_of_rows

_BUFFERS = 16

_Keys = npt.NDArray[Any]


class _Rows(NamedTuple):
    """Rows of one tensor, as far as this rank has them.

    Attributes:
        weights: Of the parts of rows, row by row.
        numbers: Which rows of the tensor they are parts of.
        places: Where in a row a part's weights lie.
        kept: What is decided of them, to be written.
    """

    weights: torch.Tensor
    numbers: Counts
    places: Counts
    kept: torch.Tensor


def bits_by_row_among(
    name: str, tensor: torch.Tensor, removed: int, make: MakeWeights, layout: Layout, division: Division
) -> PackedBits:
    """What `bits_by_row` gives of the whole tensor, for this rank's part of it.

    Args:
        name: What the tensor is called.
        tensor: This rank's part.
        removed: How many weights of the whole tensor go.
        make: Gives weights what they rank by.
        layout: Where the whole tensor's rows lie.
        division: How it is spread.
    """
    shape = division.shards[name].shape
    kept = torch.ones(tensor.shape, dtype=torch.bool)
    if not shape.numel():
        return pack(kept)
    quotas = quotas_of_rows(layout.row_count(shape), removed)
    length = shape.numel() // len(quotas)
    parts = [rows for rows in _rows_of(division.shards[name], tensor, kept, layout) if rows.weights.numel()]
    if _anywhere(any(len(rows.places) < length for rows in parts), division):
        # An empty part's numbers would be taken for float32's.
        largest = make({name: tensor.new_zeros(1)}).infinity
        _RowSearch(name, parts, make, division).decide(quotas, largest, length)
    else:
        for rows in parts:
            decide_rows(make({name: rows.weights}), quotas[rows.numbers], _placing(rows.kept))
    return pack(kept)


def bits_by_pattern_among(
    name: str, tensor: torch.Tensor, pattern: NMPattern, make: MakeWeights, layout: Layout, division: Division
) -> PackedBits:
    """What `bits_by_pattern` gives of the whole tensor, for this rank's part of it.

    Args:
        name: What the tensor is called.
        tensor: This rank's part.
        pattern: One that divides the whole tensor's shape.
        make: Gives weights what they rank by.
        layout: Where the whole tensor's input dimension lies.
        division: How it is spread.
    """
    dim, indices = layout.input_dim, division.shards[name].indices
    groups, members = np.unique(indices[dim] // pattern.group, return_counts=True)
    is_whole = np.repeat(members == pattern.group, members)
    if not _anywhere(bool(tensor.numel()) and not is_whole.all(), division):
        return bits_by_pattern(make({name: tensor}), pattern, layout)
    kept = torch.ones(tensor.shape, dtype=torch.bool)
    for start, stop in runs_of(np.flatnonzero(is_whole)):
        there = tensor.narrow(dim, start, stop - start)
        bits = bits_by_pattern(make({name: there}), pattern, layout)
        kept.narrow(dim, start, stop - start).copy_(unpack(bits, there.shape))
    places = np.flatnonzero(~is_whole)
    theirs = _tell_cut(name, tensor, places, dim, make, division)
    if len(places) and tensor.numel():
        wanted = (groups[members < pattern.group, None] * pattern.group + np.arange(pattern.group)).reshape(-1)
        keys = _put_together(theirs, (*indices[:dim], wanted, *indices[dim + 1 :]))
        inner = math.prod(keys.shape[dim + 1 :])
        strong = strongest(keys.reshape(-1, pattern.group, inner), pattern.kept).reshape(keys.shape)
        mine = strong.take(np.searchsorted(wanted, indices[dim][places]), axis=dim)
        kept.index_copy_(dim, torch.from_numpy(places), torch.from_numpy(mine))
    return pack(kept)


class _Told(NamedTuple):
    """Members of cut groups that one rank has: their indices in the tensor, and what they rank by."""

    indices: tuple[Counts, ...]
    keys: _Keys


def _tell_cut(
    name: str, tensor: torch.Tensor, places: Counts, dim: int, make: MakeWeights, division: Division
) -> list[_Told]:
    """What every rank has of groups that are cut."""
    indices = division.shards[name].indices
    mine = tensor.index_select(dim, torch.from_numpy(places).to(tensor.device))
    told = None
    if mine.numel() and name in division.counted:
        keys = make({name: mine}).magnitudes(0, mine.numel()).reshape(mine.shape)
        told = _Told((*indices[:dim], indices[dim][places], *indices[dim + 1 :]), keys)
    return [one for one in division.ranks.gather(told) if one is not None]


def _put_together(told: list[_Told], indices: tuple[Counts, ...]) -> _Keys:
    """What these weights of the whole tensor rank by, every combination of the indices having been told."""
    keys = np.zeros([len(held) for held in indices], told[0].keys.dtype)
    for theirs in told:
        pairs = [
            np.intersect1d(ours, other, assume_unique=True, return_indices=True)[1:]
            for ours, other in zip(indices, theirs.indices, strict=True)
        ]
        keys[np.ix_(*(here for here, _ in pairs))] = theirs.keys[np.ix_(*(there for _, there in pairs))]
    return keys


def _anywhere(here: bool, division: Division) -> bool:
    """Whether something is so on any rank."""
    return bool(division.ranks.sum(np.array([here], np.int64)).any())


def _placing(kept: torch.Tensor) -> Callable[[int, npt.NDArray[np.bool_]], None]:
    def place(first: int, decisions: npt.NDArray[np.bool_]) -> None:
        rows = kept[first : first + decisions.shape[0]]
        rows.copy_(torch.from_numpy(decisions).view(rows.shape))

    return place


class _RowSearch:
    """Lines through rows, all found together."""

    def __init__(self, name: str, rows: list[_Rows], make: MakeWeights, division: Division) -> None:
        self._name, self._rows, self._make = name, rows, make
        self._counts_here = name in division.counted
        self._division = division

    def decide(self, quotas: Counts, largest: int, length: int) -> None:
        """Mark the quota of each row that ranks lowest, of equal weights the first."""
        # Below the line of a row fewer than its quota lie, up to it as many or more; -1 for rows that lose none.
        lines = self._least(lambda keys, _, line: keys <= line, quotas, largest)
        below = self._count(lambda keys, _, line: keys < line, lines)
        places = self._least(
            lambda keys, place, line, tie: (keys == tie) & (place <= line), quotas - below, length - 1, lines
        )
        for rows, first, last, keys in self._blocks():
            numbers = rows.numbers[first:last]
            line, place = lines[numbers, None], places[numbers, None]
            kept = (keys > line) | ((keys == line) & (rows.places > place))
            _placing(rows.kept)(first, kept)

    def _least(self, holds: Callable[..., Any], wanted: Counts, most: int, *beside: Counts) -> Counts:
        """For each row the least number up to which as many weights as wanted lie; -1 where none is wanted."""
        low, high = np.full(len(wanted), -1, np.int64), np.where(wanted > 0, most, -1)
        while (high - low > 1).any():
            middle = low + (high - low) // 2
            enough = self._count(holds, middle, *beside) >= wanted
            low, high = np.where(enough, low, middle), np.where(enough, middle, high)
        return high

    def _count(self, holds: Callable[..., Any], *numbers: Counts) -> Counts:
        """For each row how many weights something holds of, given its numbers, over all ranks."""
        counts = np.zeros(len(numbers[0]), np.int64)
        if self._counts_here:
            for rows, first, last, keys in self._blocks():
                here = rows.numbers[first:last]
                counts[here] += holds(keys, rows.places, *(one[here, None] for one in numbers)).sum(axis=1)
        return self._division.ranks.sum(counts)

    def _blocks(self) -> Iterator[tuple[_Rows, int, int, _Keys]]:
        for rows in self._rows:
            number, length = len(rows.numbers), len(rows.places)
            weights = self._make({self._name: rows.weights})
            size = max(1, block_size(weights.dtype, _BUFFERS) // length)
            for first in range(0, number, size):
                last = min(first + size, number)
                yield rows, first, last, weights.magnitudes(first * length, last * length).reshape(-1, length)


def _rows_of(shard: Shard, tensor: torch.Tensor, kept: torch.Tensor, layout: Layout) -> Iterator[_Rows]:
    """The rows' parts; of a tensor that holds its inputs in groups, group by group."""
    if len(shard.shape) < 2:
        places = shard.indices[0] if shard.indices else np.zeros(1, np.int64)
        yield _Rows(tensor.reshape(1, -1), np.zeros(1, np.int64), places, kept.view(1, -1))
        return
    if layout.rows_first:
        yield _Rows(tensor, shard.indices[0], _places(shard.shape[1:], shard.indices[1:]), kept)
        return
    inputs, outputs = shard.indices[0], shard.shape[1]
    size = shard.shape[0] // layout.groups
    for group in range(layout.groups):
        first, last = np.searchsorted(inputs, [group * size, (group + 1) * size]).tolist()
        held = (inputs[first:last] - group * size, *shard.indices[2:])
        yield _Rows(
            tensor[first:last].transpose(0, 1),
            shard.indices[1] + group * outputs,
            _places(torch.Size((size, *shard.shape[2:])), held),
            kept[first:last].transpose(0, 1),
        )


def _places(shape: torch.Size, indices: tuple[Counts, ...]) -> Counts:
    """Where every combination of indices lies in a tensor of this shape, row-major."""
    places = np.zeros(1, np.int64)
    for size, held in zip(shape, indices, strict=True):
        places = (places[:, None] * size + held).reshape(-1)
    return places
