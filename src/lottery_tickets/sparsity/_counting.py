"""What is done with one block: count, compare and pack, on the CPU by compiled loops, elsewhere by torch.

Integers come with their sign bit; keys and thresholds are magnitudes (sign dropped), thresholds down to -1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.masks import PackedBits

Counts = npt.NDArray[np.int64]

# Some bits of a number: (place, mask) for `(number >> place) & mask`.
Digit = tuple[int, int]

# Bits of the first histogram.
LEADING = 15


class Bracketed(NamedTuple):
    """What a block says of a bracket [low, high] of magnitudes.

    `around` counts the magnitudes at or above low, above low, at or above high, above high, and above the largest
    number; `inside` holds those strictly between low and high, in order.
    """

    around: Counts
    inside: npt.NDArray[Any]


class Ladder:
    """Ascending numbers of a common length in bits, found by their leading 15.

    Attributes:
        numbers: The numbers.
        rungs: The numbers, and one larger than any at the end.
        shift: What leaves the leading bits, `number >> shift`.
        starts: For each value of the leading bits, how many numbers lie below all that begin with it; their count
            at the end.
    """

    def __init__(self, numbers: list[int], bits: int) -> None:
        self.rungs: Counts = np.array([*numbers, np.iinfo(np.int64).max])
        self.numbers = self.rungs[:-1]
        self.shift = bits - LEADING
        firsts = np.arange(1 << LEADING) << self.shift
        self.starts = np.append(np.searchsorted(self.numbers, firsts), len(numbers)).astype(np.int32)


def above(integers: torch.Tensor, thresholds: list[int]) -> Counts:
    """How many magnitudes are greater than each threshold."""
    if not integers.is_cpu:
        return _above_torch(integers, thresholds)
    from lottery_tickets import _kernels

    weights = integers.numpy()
    counts = np.zeros(len(thresholds), np.int64)
    _kernels.count_above(weights, np.array(thresholds, weights.dtype), counts)
    return counts


def leading_bits(integers: torch.Tensor, shift: int, bins: int) -> Counts:
    """Histogram of the magnitudes' leading bits, `magnitude >> shift`."""
    if not integers.is_cpu:
        return _leading_bits_torch(integers, shift, bins)
    from lottery_tickets import _kernels

    ways = np.zeros((_kernels.WAYS, bins + _kernels.STRIDE_PADDING), np.int32)
    _kernels.histogram(integers.numpy(), shift, ways.reshape(-1))
    total: Counts = ways[:, :bins].sum(axis=0, dtype=np.int64)
    return total


def bits_inside(integers: torch.Tensor, low: int, high: int, shift: int) -> Counts:
    """Histogram of `(magnitude - low) >> shift` over the magnitudes in [low, high]."""
    if not integers.is_cpu:
        return _bits_inside_torch(integers, low, high, shift)
    from lottery_tickets import _kernels

    weights = integers.numpy()
    bins = np.zeros((high - low >> shift) + 1, np.int64)
    integer = weights.dtype.type
    _kernels.histogram_inside(weights, integer(low), integer(high), shift, bins)
    return bins


def digit_sums(integers: torch.Tensor, stored: int, digit: Digit) -> Counts:
    """Sums of a digit of the magnitudes' significands, by exponent.

    Args:
        integers: Of weights.
        stored: How many bits of a significand a weight has.
        digit: Which bits of the significand, together fewer than 63 with those of the number of weights.
    """
    exponents = 1 << (8 * integers.element_size() - 1 - stored)
    if not integers.is_cpu:
        return _digit_sums_torch(integers, stored, digit, exponents)
    from lottery_tickets import _kernels

    ways = np.zeros((_kernels.WAYS, exponents + _kernels.STRIDE_PADDING), np.int64)
    _kernels.sum_digits(integers.numpy(), stored, *digit, ways.reshape(-1))
    total: Counts = ways[:, :exponents].sum(axis=0)
    return total


def moments(integers: torch.Tensor, low: int, high: int, shift: int, first: Digit, second: Digit) -> Counts:
    """Of the magnitudes in [low, high], by `(magnitude - low) >> shift`: counts, and sums of digits.

    Args:
        integers: Of weights.
        low: The smallest magnitude.
        high: The largest.
        shift: Bits that are not told apart.
        first: A digit of at most 16 bits.
        second: What it is multiplied with, another or the same.

    Returns:
        (cells, 3): how many, the sum of their first digit, and that of the first times the second.
    """
    cells = (high - low >> shift) + 1
    if not integers.is_cpu:
        return _moments_torch(integers, low, high, shift, first, second)
    from lottery_tickets import _kernels

    # Rows of four lie in one line of the cache each.
    table = np.zeros((cells, 4), np.int64)
    weights = integers.numpy()
    integer = weights.dtype.type
    if low == 0 and high == np.iinfo(weights.dtype).max:
        _kernels.moments(weights, shift, first, second, table)
    else:
        _kernels.moments_inside(weights, integer(low), integer(high), shift, first, second, table)
    return table[:, :3]


def bits_by_prefix(integers: torch.Tensor, prefixes: Ladder, shift: int, finer: int) -> Counts:
    """Histograms of the bits from `finer` up to `shift`, one for the magnitudes that begin with each prefix.

    A magnitude's prefix is `magnitude >> shift`.
    """
    if not integers.is_cpu:
        return _bits_by_prefix_torch(integers, prefixes, shift, finer)
    from lottery_tickets import _kernels

    counts = np.zeros((prefixes.rungs.size, 1 << (shift - finer)), np.int32)
    rungs, starts, leading = prefixes.rungs, prefixes.starts, prefixes.shift + shift
    _kernels.histogram_by_prefix(integers.numpy(), rungs, starts, leading, shift, finer, counts.reshape(-1))
    return counts[:-1].astype(np.int64)


def rank_among(integers: torch.Tensor, edges: Ladder) -> npt.NDArray[np.uint8]:
    """How many of at most 255 edges lie below each magnitude."""
    if not integers.is_cpu:
        return _rank_among_torch(integers, edges)
    from lottery_tickets import _kernels

    ranks = np.empty(integers.numel(), np.uint8)
    _kernels.rank_among(integers.numpy(), edges.rungs, edges.starts, edges.shift, ranks)
    return ranks


def count_pairs(first: npt.NDArray[np.uint8], second: npt.NDArray[np.uint8]) -> Counts:
    """Table of how often each byte of the first stands beside each of the second."""
    from lottery_tickets import _kernels

    counts = np.zeros((256, 256), np.int32)
    _kernels.count_pairs(first, second, counts)
    return counts.astype(np.int64)


def bracket(integers: torch.Tensor, low: int, high: int, top: int) -> Bracketed:
    """Count around the bracket and collect what is inside it. CPU only."""
    from lottery_tickets import _kernels

    weights = integers.numpy()
    integer = weights.dtype.type
    counts = np.zeros(5, np.int64)
    # Pages of this buffer that no magnitude reaches are never touched, so it costs nothing to make it safe.
    inside = np.empty_like(weights)
    stored = _kernels.count_bracket(weights, integer(low), integer(high), integer(top), counts, inside)
    return Bracketed(counts, inside[:stored].copy())


def pack_kept(integers: torch.Tensor, key: int, ties: int, packed: PackedBits) -> None:
    """Pack `magnitude > key`, and `magnitude == key` after the first `ties` of them, into `packed`."""
    if not integers.is_cpu:
        packed[:] = _pack_kept_torch(integers, key, ties).cpu().numpy()
        return
    from lottery_tickets import _kernels

    weights = integers.numpy()
    _kernels.pack_kept(weights, weights.dtype.type(key), ties, packed)


def _magnitudes(integers: torch.Tensor) -> torch.Tensor:
    return integers & torch.iinfo(integers.dtype).max


def _above_torch(integers: torch.Tensor, thresholds: list[int]) -> Counts:
    magnitudes = _magnitudes(integers)
    return np.array([int((magnitudes > threshold).sum()) for threshold in thresholds], np.int64)


def _leading_bits_torch(integers: torch.Tensor, shift: int, bins: int) -> Counts:
    return torch.bincount((_magnitudes(integers) >> shift).long(), minlength=bins).cpu().numpy()


def _bits_inside_torch(integers: torch.Tensor, low: int, high: int, shift: int) -> Counts:
    magnitudes = _magnitudes(integers)
    inside = magnitudes[(magnitudes >= low) & (magnitudes <= high)].long() - low
    return torch.bincount(inside >> shift, minlength=(high - low >> shift) + 1).cpu().numpy()


def _digit_sums_torch(integers: torch.Tensor, stored: int, digit: Digit, exponents: int) -> Counts:
    magnitudes = _magnitudes(integers).long()
    above = magnitudes >> stored
    significands = (magnitudes & (1 << stored) - 1) | ((above > 0).long() << stored)
    sums = torch.zeros(exponents, dtype=torch.int64, device=integers.device)
    found: Counts = sums.index_add_(0, above, significands >> digit[0] & digit[1]).cpu().numpy()
    return found


def _moments_torch(integers: torch.Tensor, low: int, high: int, shift: int, first: Digit, second: Digit) -> Counts:
    magnitudes = _magnitudes(integers)
    inside = magnitudes[(magnitudes >= low) & (magnitudes <= high)].long()
    cells, number = (inside - low) >> shift, (high - low >> shift) + 1
    one, two = ((inside >> place) & mask for place, mask in (first, second))
    table = torch.zeros((number, 3), dtype=torch.int64, device=integers.device)
    for column, values in enumerate((torch.ones_like(one), one, one * two)):
        table[:, column].index_add_(0, cells, values)
    found: Counts = table.cpu().numpy()
    return found


def _bits_by_prefix_torch(integers: torch.Tensor, prefixes: Ladder, shift: int, finer: int) -> Counts:
    """One count over slots and digits; what begins with no prefix lands in a slot behind the last."""
    magnitudes, bins = _magnitudes(integers).long(), 1 << (shift - finer)
    rungs = torch.from_numpy(prefixes.rungs).to(integers.device)
    found = magnitudes >> shift
    slots = torch.bucketize(found, rungs)
    slots = torch.where(rungs[slots] == found, slots, prefixes.numbers.size)
    counts = torch.bincount(slots * bins + (magnitudes >> finer & bins - 1), minlength=rungs.numel() * bins)
    by_slot: Counts = counts.view(-1, bins)[:-1].cpu().numpy()
    return by_slot


def _rank_among_torch(integers: torch.Tensor, edges: Ladder) -> npt.NDArray[np.uint8]:
    numbers = torch.from_numpy(edges.numbers).to(integers.device, integers.dtype)
    return torch.bucketize(_magnitudes(integers), numbers).to(torch.uint8).cpu().numpy()


def _pack_kept_torch(integers: torch.Tensor, key: int, ties: int) -> torch.Tensor:
    magnitudes = _magnitudes(integers)
    equal = magnitudes == key
    kept = (magnitudes > key) | (equal & (equal.cumsum(0) > ties))
    eights = torch.nn.functional.pad(kept.to(torch.uint8), (0, -kept.numel() % 8)).view(-1, 8)
    places = 1 << torch.arange(8, dtype=torch.uint8, device=eights.device)
    return (eights * places).sum(dim=1, dtype=torch.uint8)
