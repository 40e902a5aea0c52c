"""Ranks of scores over all tensors together, by counting."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import ScoreError

# So many scores are sorted, more are counted: sorting takes 40 bytes for each, counting takes a constant.
_SORTED = 1 << 22
# Groups of 65,536 neighbouring values that are told apart at one time: 12 bytes for each value.
_SLOTS = 128
_BLOCK = 1 << 21
_SIGN = np.uint32(1 << 31)


def add_ranks(
    scores: Mapping[str, torch.Tensor],
    weight: float,
    into: Mapping[str, torch.Tensor],
    ranks: Ranks | None = None,
) -> None:
    """Add `weight * rank / N` of each of N scores, the smallest ranking 1; equal scores share their mean rank.

    Where there are many, values are counted by their bit patterns: once by the upper half, then, some upper halves
    at a time, by the lower half. Memory does not grow with the scores.

    Args:
        scores: Float32, on any device.
        weight: Of these ranks.
        into: Float32 on the CPU, contiguous, by the same names and in the same shapes.
        ranks: Processes that have scores of their own; ranks are then among all of them.

    Raises:
        ScoreError: NaN among the scores.
    """
    for name, score in scores.items():
        if bool(score.isnan().any()):
            raise ScoreError(f"{name}: NaN has no rank among scores.")
    if ranks is not None:
        _among_all(scores, weight, into, ranks)
        return
    few = sum(score.numel() for score in scores.values()) <= _SORTED
    (_by_sorting if few else _by_counting)(scores, weight, into)


def _by_sorting(scores: Mapping[str, torch.Tensor], weight: float, into: Mapping[str, torch.Tensor]) -> None:
    from scipy.stats import rankdata

    flat = torch.cat([score.reshape(-1).float().cpu() for score in scores.values()])
    shares = torch.from_numpy(rankdata(flat.numpy())).mul_(weight / max(flat.numel(), 1))
    parts = torch.split(shares, [score.numel() for score in scores.values()])
    for (name, score), part in zip(scores.items(), parts, strict=True):
        into[name].add_(part.view(score.shape))


def _by_counting(scores: Mapping[str, torch.Tensor], weight: float, into: Mapping[str, torch.Tensor]) -> None:
    from lottery_tickets import _kernels

    upper = np.zeros(1 << 16, np.int64)
    for score in scores.values():
        for keys, _ in _blocks(score, None):
            upper += np.bincount(keys >> 16, minlength=1 << 16)
    total, before = int(upper.sum()), 0
    occupied = np.flatnonzero(upper)
    for start in range(0, len(occupied), _SLOTS):
        here = occupied[start : start + _SLOTS]
        slots = np.full(1 << 16, -1, np.int32)
        slots[here] = np.arange(len(here), dtype=np.int32)
        counts = np.zeros(len(here) << 16, np.int32)
        for score in scores.values():
            for keys, _ in _blocks(score, None):
                _kernels.count_slots(keys, slots, counts)
        ends = counts.cumsum(dtype=np.float64)
        # Ranks end - count + 1 ... end, on the average end - (count - 1) / 2.
        shares = (before + ends - (counts - 1) / 2) * (weight / total)
        before += int(upper[here].sum())
        for name, score in scores.items():
            for keys, out in _blocks(score, into[name]):
                _kernels.add_from_slots(keys, slots, shares, out)


def _among_all(
    scores: Mapping[str, torch.Tensor], weight: float, into: Mapping[str, torch.Tensor], ranks: Ranks
) -> None:
    """Each process tells which values it has and how many of each, some of the values at a time."""
    upper = np.zeros(1 << 16, np.int64)
    for score in scores.values():
        for keys, _ in _blocks(score, None):
            upper += np.bincount(keys >> 16, minlength=1 << 16)
    upper = ranks.sum(upper)
    total, before = int(upper.sum()), 0
    most = np.minimum(upper, 1 << 16)  # values that begin with these bits
    for first, last in _runs(most, _SORTED):
        mine = _added([])
        for score in scores.values():
            for keys, _ in _blocks(score, None):
                inside = keys[(keys >> 16 >= first) & (keys >> 16 < last)]
                mine = _added([mine, np.unique(inside, return_counts=True)])
        told = ranks.gather(mine)
        values, counts = _added(told)
        shares = (before + counts.cumsum(dtype=np.float64) - (counts - 1) / 2) * (weight / total)
        before += int(counts.sum())
        for name, score in scores.items():
            for keys, out in _blocks(score, into[name]):
                chosen = (keys >> 16 >= first) & (keys >> 16 < last)
                out[chosen] += shares[np.searchsorted(values, keys[chosen])]


def _runs(sizes: Any, most: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of sizes that are not all nothing, each of so much together or of one."""
    first, held = 0, 0
    for place, size in enumerate(sizes.tolist()):
        if held and held + size > most:
            yield first, place
            first, held = place, 0
        held += size
    if held:
        yield first, len(sizes)


def _added(parts: Sequence[tuple[Any, Any]]) -> tuple[Any, Any]:
    """Values and how many there are of each, put together."""
    every = np.concatenate([np.zeros(0, np.uint32), *(values for values, _ in parts)])
    numbers = np.concatenate([np.zeros(0, np.int64), *(counts for _, counts in parts)])
    values, places = np.unique(every, return_inverse=True)
    counts = np.zeros(len(values), np.int64)
    np.add.at(counts, places, numbers)
    return values, counts


def _blocks(score: torch.Tensor, out: torch.Tensor | None) -> Iterator[tuple[Any, Any]]:
    """Runs of a tensor as unsigned integers in the order of the values, beside the same runs of `out`."""
    flat = score.reshape(-1)
    target = None if out is None else out.view(-1).numpy()
    for start in range(0, flat.numel(), _BLOCK):
        # Adding zero makes one of the two zeros.
        bits = (flat[start : start + _BLOCK].float().cpu() + 0.0).numpy().view(np.uint32)
        keys = np.where(bits & _SIGN, ~bits, bits | _SIGN)
        yield keys, None if target is None else target[start : start + _BLOCK]
