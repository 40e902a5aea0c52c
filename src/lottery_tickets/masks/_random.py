"""Uniformly random bits with an exact count, in memory that does not grow with the count.

Every weight draws a 64-bit key, and the smallest keys are removed. The keys come from a counter-based
generator, so a pass over them can be repeated instead of stored, and the largest removed key is found by
counting 16 bits of it a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from lottery_tickets.masks import _bits
from lottery_tickets.masks._bits import PackedBits

_DIGIT = 16
_KEY_BITS = 64


def random_bits(numels: Sequence[int], kept: int, *, seed: int, streams: Sequence[int]) -> list[PackedBits]:
    """Packed bits for tensors of these sizes with `kept` bits set in all, every choice equally likely."""
    if seed < 0:
        raise ValueError(f"A seed is a non-negative integer, got {seed}.")
    removed = sum(numels) - kept
    prefix, shift, ties = _line(numels, removed, seed, streams)
    packed = [np.zeros(_bits.packed_size(numel), np.uint8) for numel in numels]
    for tensor, start, keys in _keys(numels, seed, streams):
        digits = keys >> np.uint64(shift)
        keep = digits > prefix
        equal = np.flatnonzero(digits == prefix)
        keep[equal[ties:]] = True
        ties = max(0, ties - equal.size)
        bits = np.packbits(keep, bitorder="little")
        packed[tensor][start // 8 : start // 8 + bits.size] = bits
    return packed


def _line(numels: Sequence[int], removed: int, seed: int, streams: Sequence[int]) -> tuple[np.uint64, int, int]:
    """Leading digits of the largest removed key, how far keys are shifted to show them, and ties removed."""
    prefix = np.uint64(0)
    shift = _KEY_BITS
    while shift:
        shift -= _DIGIT
        counts = np.zeros(1 << _DIGIT, np.int64)
        for _, _, keys in _keys(numels, seed, streams):
            digits = keys >> np.uint64(shift)
            if shift + _DIGIT < _KEY_BITS:
                digits = digits[digits >> np.uint64(_DIGIT) == prefix]
            last = digits & np.uint64((1 << _DIGIT) - 1)
            counts += np.bincount(last.view(np.int64), minlength=counts.size)  # before numpy 2.2 it takes no other
        totals = np.cumsum(counts)
        digit = min(int(np.searchsorted(totals, removed)), counts.size - 1)
        removed -= int(totals[digit] - counts[digit])
        prefix = (prefix << np.uint64(_DIGIT)) | np.uint64(digit)
        if removed in (0, counts[digit]):
            break
    return prefix, shift, removed


def _keys(
    numels: Sequence[int], seed: int, streams: Sequence[int]
) -> Iterator[tuple[int, int, npt.NDArray[np.uint64]]]:
    """Index of the tensor, position of the block in it, and the block's keys."""
    for tensor, (numel, stream) in enumerate(zip(numels, streams, strict=True)):
        for block, start in enumerate(range(0, numel, _bits.BLOCK)):
            # The generator counts up in the lowest word; block and tensor index its streams from above.
            source = np.random.Philox(key=seed, counter=[0, block, stream, 0])
            yield tensor, start, source.random_raw(min(_bits.BLOCK, numel - start))
