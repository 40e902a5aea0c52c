"""LAMP: layers made comparable by what a weight's square is of the squares that are not smaller, in its layer.

Sorted ascending inside its layer, weight u scores `w_u^2 / (w_u^2 + w_(u+1)^2 + ...)`, and the smallest scores of
all layers go. Scores rise as the weights do, so the scores need not be kept: a layer loses its smallest weights,
and only their number is to be found. Two rounds of sorting one tensor after the other find it. The first samples
every layer's scores at even distances; counting how many weights lie surely below and possibly below each sample
encloses the score at the cut. The second collects the scores inside the enclosure. Sums run from the largest
square down in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.errors import SparsityError
from lottery_tickets.sparsity import _counting
from lottery_tickets.sparsity._blocks import INTEGERS, Pages, Weights, block_size, for_each_run

_Floats = npt.NDArray[np.float64]
_Integers = npt.NDArray[np.int64]

# Samples over all layers: 16 bytes each, and each stands for numel / samples scores that may have to be collected.
_SAMPLES = 1 << 20
_BUFFERS = 8


class _Enclosure(NamedTuple):
    """The score at a cut is above `low` and at most `high`; `removed` scores lie below the cut or at it."""

    low: float
    high: float
    removed: int


class _Inside(NamedTuple):
    """One layer in an enclosure: how many scores are at most its low end, and those above as runs of equals."""

    below: int
    values: _Floats
    counts: _Integers


def lamp_removals(
    tensors: Mapping[str, torch.Tensor],
    removals: Sequence[int],
    *,
    pages: Pages | None = None,
    progress: str | None = None,
) -> list[dict[str, int]]:
    """How many weights each tensor loses by LAMP scores, for each number to remove in all.

    A tensor's largest weight scores 1 and is never removed. Equal scores go by position of the tensor, as weights
    do. More removals give each tensor no fewer. Memory: for each thread a sorted copy of one tensor at a time, in
    its own data type, and a constant.

    Args:
        tensors: Name to weights without NaN and inf.
        removals: How many weights go in all, once or several times.
        pages: What is told where weights will be read, if they lie in files.
        progress: Name of a progress bar; None for none.

    Raises:
        SparsityError: More is to go than leaves each tensor one weight.
    """
    numels = {name: tensor.numel() for name, tensor in tensors.items()}
    most = sum(max(numel - 1, 0) for numel in numels.values())
    for removed in removals:
        if removed > most:
            raise SparsityError(
                f"Cannot remove {removed} of {sum(numels.values())} weights: every tensor keeps at least 1, so at "
                f"most {most} can go. Lower the sparsity, or leave small tensors out."
            )
    wanted = [removed for removed in removals if removed]
    ranked = [name for name, numel in numels.items() if numel > 1]
    stride = max(1, most // _SAMPLES)
    if not wanted:
        return [dict.fromkeys(numels, 0) for _ in removals]
    for_each_layer = partial(
        for_each_run, items=ranked, run_of=tensors.__getitem__, pages=pages, progress=progress
    )
    samples = for_each_layer(lambda name: _samples(tensors[name], stride))
    enclosures = _enclose(samples, wanted)
    inside = for_each_layer(lambda name: _collect(tensors[name], enclosures))
    found = {
        enclosure.removed: dict(zip(ranked, _cut(enclosure, [layer[index] for layer in inside]), strict=True))
        for index, enclosure in enumerate(enclosures)
    }
    return [dict.fromkeys(numels, 0) | found.get(removed, {}) for removed in removals]


def _samples(tensor: torch.Tensor, stride: int) -> tuple[_Floats, _Integers]:
    """Every `stride`-th score of all but the largest weight, the last always; and how many are not behind each."""
    last = tensor.numel() - 1
    values, places = [], []
    for start, scores in _scores(tensor):
        taken = np.arange(start + (-start - 1) % stride, start + scores.size, stride)
        taken = np.union1d(taken, [last - 1] if start < last <= start + scores.size else [])
        taken = taken[taken < last].astype(np.int64)
        values.append(scores[taken - start])
        places.append(taken + 1)
    return np.concatenate(values[::-1]), np.concatenate(places[::-1])


def _enclose(layers: Sequence[tuple[_Floats, _Integers]], removals: Sequence[int]) -> list[_Enclosure]:
    values = np.concatenate([values for values, _ in layers])
    # As a sample is passed, the weights up to it are surely below, and possibly those before the next sample.
    surely = np.concatenate([np.diff(places, prepend=0) for _, places in layers])
    possibly = np.concatenate([np.diff(places, append=places[-1] + 1) for _, places in layers])
    order = np.argsort(values, kind="stable")
    values = values[order]
    ends = np.append(np.flatnonzero(np.diff(values)), values.size - 1)
    values, sure = values[ends], np.cumsum(surely[order])[ends]
    possible = np.cumsum(possibly[order])[ends] + sum(int(places[0]) - 1 for _, places in layers)
    enclosures = []
    for removed in removals:
        before = int(np.searchsorted(possible, removed))
        low = float(values[before - 1]) if before else -1.0
        enclosures.append(_Enclosure(low, float(values[np.searchsorted(sure, removed)]), removed))
    return enclosures


def _collect(tensor: torch.Tensor, enclosures: Sequence[_Enclosure]) -> list[_Inside]:
    last = tensor.numel() - 1
    below = [0] * len(enclosures)
    inside: list[list[_Floats]] = [[] for _ in enclosures]
    for start, scores in _scores(tensor):
        ranked = scores[: max(last - start, 0)]
        for index, enclosure in enumerate(enclosures):
            first = int(np.searchsorted(ranked, enclosure.low, side="right"))
            end = int(np.searchsorted(ranked, enclosure.high, side="right"))
            below[index] += first
            inside[index].append(ranked[first:end].copy())
    runs = [np.unique(np.concatenate(found), return_counts=True) for found in inside]
    return [_Inside(count, *run) for count, run in zip(below, runs, strict=True)]


def _cut(enclosure: _Enclosure, layers: Sequence[_Inside]) -> list[int]:
    """How many each layer loses: all below the score at the cut, and of those equal to it the first layers'."""
    values = np.concatenate([layer.values for layer in layers])
    order = np.argsort(values, kind="stable")
    below = sum(layer.below for layer in layers)
    counted = np.cumsum(np.concatenate([layer.counts for layer in layers])[order])
    cut = values[order][np.searchsorted(counted, enclosure.removed - below)]
    lost = [layer.below + int(layer.counts[layer.values < cut].sum()) for layer in layers]
    left = enclosure.removed - sum(lost)
    for index, layer in enumerate(layers):
        ties = min(left, int(layer.counts[layer.values == cut].sum()))
        lost[index] += ties
        left -= ties
    return lost


def _scores(tensor: torch.Tensor) -> Iterator[tuple[int, _Floats]]:
    """LAMP scores in ascending order, in blocks from the largest down, each with the place of its first."""
    keys, dtype = _sorted_keys(tensor)
    size = block_size(torch.float64, _BUFFERS)
    # A power of two multiplies exactly; without it squares of float64 could leave its range.
    scale = math.ldexp(1.0, min(-math.frexp(float(_values(keys[-1:], dtype)[0]))[1], 1023))
    total = 0.0
    for stop in range(keys.size, 0, -size):
        start = max(0, stop - size)
        falling = np.square(_values(keys[start:stop], dtype) * scale)[::-1]
        sums = falling.copy()
        sums[0] += total
        np.cumsum(sums, out=sums)
        total = float(sums[-1])
        yield start, np.divide(falling, sums, out=np.zeros_like(sums), where=sums > 0)[::-1]


def _sorted_keys(tensor: torch.Tensor) -> tuple[npt.NDArray[Any], torch.dtype]:
    """The magnitudes' bit patterns, which sort as the magnitudes do and take no more than they."""
    weights = Weights({"": tensor})
    if weights.width == 15:  # few enough to count each
        counts = sum(_counting.leading_bits(weights.integers(block), 0, 1 << 15) for block in weights.blocks)
        return np.repeat(np.arange(1 << 15, dtype=np.int16), counts), tensor.dtype
    keys = np.empty(tensor.numel(), f"int{8 * tensor.element_size()}")
    for block in weights.blocks:
        keys[block.start : block.stop] = weights.magnitudes(block.start, block.stop)
    keys.sort()
    return keys, tensor.dtype


def _values(keys: npt.NDArray[Any], dtype: torch.dtype) -> _Floats:
    return torch.from_numpy(keys).to(INTEGERS[dtype]).view(dtype).double().numpy()
