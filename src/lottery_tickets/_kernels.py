"""Compiled loops over bit patterns: compare and pack, count, select.

A weight is read as the integer with its bits. Without the sign bit these integers are ordered as the
magnitudes are, so every comparison here is one of integers: no NaN rules, no flushed subnormals.

numba compiles the loops for the machine they run on and caches them on disk. The comparison of 64 weights at
a time is written in LLVM's vector types: `<64 x i1>` is one 64-bit word of a packed mask, which the compiler
makes with the widest registers it finds. All kernels release the GIL and touch only their arguments, so any
number of Python threads may run them.

Arrays are one-dimensional and C-contiguous: weights int16, int32 or int64, packed bits uint8, eight to a byte,
the first weight in the lowest bit.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("lottery_tickets packs bits in the order of little-endian machines; this one is not.")

LANES = 64
# Equal neighbours would wait for each other's store to the same counter: four histograms take turns, and the
# odd stride keeps them from sharing cache sets when nearly all weights are zero.
WAYS = 4
STRIDE_PADDING = 8

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_BITS = ir.VectorType(ir.IntType(1), LANES)


def _lanes_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> tuple[Any, Any]:
    """Pointer to the 64 elements from `index` on, as one vector, and the type of that vector."""
    element = context.get_value_type(array_type.dtype)
    vector = ir.VectorType(element, LANES)
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer()), vector


@intrinsic
def _above64(_context: Any, array: Any, index: Any, threshold: Any) -> tuple[Any, Callable[..., Any]]:
    """Word whose bit j tells whether weight index + j, sign dropped, is greater than the threshold."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, vector = _lanes_at(context, builder, signature.args[0], arguments[0], arguments[1])
        width = vector.element.width
        weights = builder.load(pointer, align=width // 8)
        magnitudes = builder.and_(weights, ir.Constant(vector, [(1 << (width - 1)) - 1] * LANES))
        undefined = ir.Constant(vector, ir.Undefined)
        first = builder.insert_element(undefined, arguments[2], ir.Constant(_I32, 0))
        everywhere = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        thresholds = builder.shuffle_vector(first, undefined, everywhere)
        return builder.bitcast(builder.icmp_signed(">", magnitudes, thresholds), _I64)

    return types.uint64(array, types.intp, array.dtype), generate


@intrinsic
def _keep64(_context: Any, source: Any, index: Any, word: Any, target: Any) -> tuple[Any, Callable[..., Any]]:
    """Copy 64 elements where the word's bits are set, zero the others."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        read, vector = _lanes_at(context, builder, signature.args[0], arguments[0], arguments[1])
        write, _ = _lanes_at(context, builder, signature.args[3], arguments[3], arguments[1])
        align = vector.element.width // 8
        zeros = ir.Constant(vector, [0] * LANES)
        kept = builder.select(builder.bitcast(arguments[2], _BITS), builder.load(read, align=align), zeros)
        builder.store(kept, write, align=align)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.uint64, target), generate


@intrinsic
def _popcount(_context: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """Number of set bits."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@intrinsic
def _lowest_bit(_context: Any, word: Any) -> tuple[Any, Callable[..., Any]]:
    """Index of the lowest set bit of a word that has one."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), generate


@njit(nogil=True, cache=True)
def pack_kept(weights: Any, key: Any, ties: int, packed: Any) -> None:
    """Pack weight > key, and weight == key after the first `ties` such weights. `key - 1` must not overflow."""
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    below = weights.dtype.type(key - 1)
    words = weights.size // LANES
    target = packed[: words * 8].view(np.uint64)
    left = np.uint64(ties)
    one = np.uint64(1)
    for word in range(words):
        above = _above64(weights, word * LANES, key)
        equal = _above64(weights, word * LANES, below) & ~above
        if left:
            here = _popcount(equal)
            if here <= left:
                left -= here
                equal = np.uint64(0)
            else:
                while left:
                    equal &= equal - one
                    left -= one
        target[word] = above | equal
    for byte in range(words * 8, packed.size):
        bits = 0
        for position in range(byte * 8, min(byte * 8 + 8, weights.size)):
            magnitude = weights[position] & sign_off
            if magnitude == key and left:
                left -= one
            elif magnitude >= key:
                bits |= 1 << (position - byte * 8)
        packed[byte] = bits


@njit(nogil=True, cache=True)
def count_above(weights: Any, thresholds: Any, counts: Any) -> None:
    """Add to each count the number of weights above its threshold."""
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    words = weights.size // LANES
    for word in range(words):
        for slot in range(thresholds.size):
            counts[slot] += np.int64(_popcount(_above64(weights, word * LANES, thresholds[slot])))
    for position in range(words * LANES, weights.size):
        for slot in range(thresholds.size):
            counts[slot] += (weights[position] & sign_off) > thresholds[slot]


@njit(nogil=True, cache=True)
def count_bracket(weights: Any, low: Any, high: Any, top: Any, counts: Any, inside: Any) -> int:
    """Count weights above low - 1, low, high - 1, high and top; store those strictly between low and high.

    Returns how many lie between. The caller makes `inside` as long as `weights`.
    """
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    below_low = weights.dtype.type(low - 1)
    below_high = weights.dtype.type(high - 1)
    from_low = np.uint64(0)
    above_low = np.uint64(0)
    from_high = np.uint64(0)
    above_high = np.uint64(0)
    above_top = np.uint64(0)
    stored = 0
    words = weights.size // LANES
    for word in range(words):
        start = word * LANES
        from_low += _popcount(_above64(weights, start, below_low))
        lower = _above64(weights, start, low)
        above_low += _popcount(lower)
        upper = _above64(weights, start, below_high)
        from_high += _popcount(upper)
        above_high += _popcount(_above64(weights, start, high))
        above_top += _popcount(_above64(weights, start, top))
        between = lower & ~upper
        while between:
            inside[stored] = weights[start + np.intp(_lowest_bit(between))] & sign_off
            stored += 1
            between &= between - np.uint64(1)
    for position in range(words * LANES, weights.size):
        magnitude = weights[position] & sign_off
        from_low += np.uint64(magnitude > below_low)
        above_low += np.uint64(magnitude > low)
        from_high += np.uint64(magnitude > below_high)
        above_high += np.uint64(magnitude > high)
        above_top += np.uint64(magnitude > top)
        if low < magnitude < high:
            inside[stored] = magnitude
            stored += 1
    counts[0] = from_low
    counts[1] = above_low
    counts[2] = from_high
    counts[3] = above_high
    counts[4] = above_top
    return stored


@njit(nogil=True, cache=True)
def histogram(weights: Any, shift: int, ways: Any) -> None:
    """Count weights by their leading bits, sign dropped, in WAYS histograms side by side in `ways`."""
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    stride = ways.size // WAYS
    whole = weights.size - weights.size % WAYS
    for start in range(0, whole, WAYS):
        for way in range(WAYS):
            ways[way * stride + ((weights[start + way] & sign_off) >> shift)] += 1
    for position in range(whole, weights.size):
        ways[(weights[position] & sign_off) >> shift] += 1


@njit(nogil=True, cache=True)
def histogram_inside(weights: Any, low: Any, high: Any, shift: int, bins: Any) -> None:
    """Count weights in [low, high] by (weight - low) >> shift; `low - 1` must not overflow."""
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    below = weights.dtype.type(low - 1)
    words = weights.size // LANES
    for word in range(words):
        start = word * LANES
        inside = _above64(weights, start, below) & ~_above64(weights, start, high)
        while inside:
            magnitude = weights[start + np.intp(_lowest_bit(inside))] & sign_off
            bins[(magnitude - low) >> shift] += 1
            inside &= inside - np.uint64(1)
    for position in range(words * LANES, weights.size):
        magnitude = weights[position] & sign_off
        if low <= magnitude <= high:
            bins[(magnitude - low) >> shift] += 1


@njit(nogil=True, cache=True)
def sum_digits(weights: Any, stored: int, place: int, mask: int, ways: Any) -> None:
    """Add up a digit of the significands, `significand >> place & mask`, by exponent, in WAYS rows of `ways`.

    `stored` is how many bits of a significand a weight has; the one before them is there unless the exponent is 0.
    """
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    low = (1 << stored) - 1
    stride = ways.size // WAYS
    for position in range(weights.size):
        magnitude = np.int64(weights[position] & sign_off)
        exponent = magnitude >> stored
        significand = (magnitude & low) | (np.int64(exponent > 0) << stored)
        ways[np.uint64((position % WAYS) * stride + exponent)] += (significand >> place) & mask


@njit(nogil=True, cache=True)
def moments(weights: Any, shift: int, first: Any, second: Any, table: Any) -> None:
    """For weights by their leading bits, `magnitude >> shift`: how many, a digit's sum, that of two's product.

    A digit is (place, mask): `(magnitude >> place) & mask`, of at most 16 bits.
    """
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    for position in range(weights.size):
        magnitude = np.int64(weights[position] & sign_off)
        one = (magnitude >> first[0]) & first[1]
        cell = np.uint64(magnitude >> shift)
        table[cell, 0] += 1
        table[cell, 1] += one
        table[cell, 2] += one * ((magnitude >> second[0]) & second[1])


@njit(nogil=True, cache=True)
def moments_inside(weights: Any, low: Any, high: Any, shift: int, first: Any, second: Any, table: Any) -> None:
    """The same for weights in [low, high], by `(magnitude - low) >> shift`; `low - 1` must not overflow."""
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    below = weights.dtype.type(low - 1)
    words = weights.size // LANES
    for word in range(words + 1):
        start = word * LANES
        if word < words:
            inside = _above64(weights, start, below) & ~_above64(weights, start, high)
        else:
            inside = np.uint64(0)
            for position in range(start, weights.size):
                held = low <= (weights[position] & sign_off) <= high
                inside |= np.uint64(held) << np.uint64(position - start)
        while inside:
            magnitude = np.int64(weights[start + np.intp(_lowest_bit(inside))] & sign_off)
            one = (magnitude >> first[0]) & first[1]
            cell = np.uint64((magnitude - low) >> shift)
            table[cell, 0] += 1
            table[cell, 1] += one
            table[cell, 2] += one * ((magnitude >> second[0]) & second[1])
            inside &= inside - np.uint64(1)


@njit(nogil=True, cache=True)
def _first_from(rungs: Any, first: Any, end: Any, least: Any) -> Any:
    """Index of the first of the ascending rungs [first, end) that is at least this number; `end` if none is."""
    low, high = np.intp(first), np.intp(end)
    while low < high:
        middle = (low + high) >> 1
        if rungs[middle] < least:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def histogram_by_prefix(weights: Any, rungs: Any, starts: Any, top: int, middle: int, low: int, bins: Any) -> None:
    """Count weights by their prefix, `magnitude >> middle`, and the bits below it down to `low`.

    Prefixes are looked for among the ascending rungs, of which the last is larger than any; each has its run of
    `bins`, and the last run is in use for what is found nowhere. `starts` tells for each value of the leading
    bits, `magnitude >> top`, how many rungs lie below those that begin with it.
    """
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    digit = np.uint64(middle - low)
    last = (1 << (middle - low)) - 1
    for position in range(weights.size):
        magnitude = weights[position] & sign_off
        prefix = magnitude >> middle
        leading = magnitude >> top
        # Unsigned, because a signed index is tried for being negative, which takes longer than the count.
        slot = np.uint64(starts[leading])
        # One comparison is added up, because no branch predicts it; the rungs of one bin are seldom more.
        slot += np.uint64(rungs[slot] < prefix)
        if rungs[slot] < prefix:
            slot = np.uint64(_first_from(rungs, slot, starts[leading + 1], prefix))
        bins[(slot << digit) + np.uint64((magnitude >> low) & last)] += np.int32(rungs[slot] == prefix)


@njit(nogil=True, cache=True)
def rank_among(weights: Any, rungs: Any, starts: Any, shift: int, ranks: Any) -> None:
    """How many rungs lie below each magnitude; rungs and starts as in `histogram_by_prefix`."""
    sign_off = (1 << (weights.itemsize * 8 - 1)) - 1
    for position in range(weights.size):
        magnitude = weights[position] & sign_off
        leading = magnitude >> shift
        rank = np.uint64(starts[leading])
        rank += np.uint64(rungs[rank] < magnitude)
        if rungs[rank] < magnitude:
            rank = np.uint64(_first_from(rungs, rank, starts[leading + 1], magnitude))
        ranks[position] = rank


@njit(nogil=True, cache=True)
def count_pairs(first: Any, second: Any, counts: Any) -> None:
    """Count positions by both of their bytes."""
    for position in range(first.size):
        counts[first[position], second[position]] += 1


@njit(nogil=True, cache=True)
def keep(weights: Any, packed: Any, kept: Any) -> None:
    """Copy weights whose bit is set, bit for bit; the others become +0."""
    words = weights.size // LANES
    bits = packed[: words * 8].view(np.uint64)
    for word in range(words):
        _keep64(weights, word * LANES, bits[word], kept)
    for position in range(words * LANES, weights.size):
        if packed[position >> 3] >> (position & 7) & 1:
            kept[position] = weights[position]
        else:
            kept[position] = 0


@njit(nogil=True, cache=True)
def count_slots(keys: Any, slots: Any, counts: Any) -> None:
    """Count keys whose upper 16 bits have a slot (not -1), by that slot and their lower 16 bits."""
    for position in range(keys.size):
        slot = slots[keys[position] >> 16]
        if slot >= 0:
            counts[(np.int64(slot) << 16) + (keys[position] & 0xFFFF)] += 1


@njit(nogil=True, cache=True)
def add_from_slots(keys: Any, slots: Any, values: Any, out: Any) -> None:
    """Add to each place the value of its key, where the key's upper 16 bits have a slot."""
    for position in range(keys.size):
        slot = slots[keys[position] >> 16]
        if slot >= 0:
            out[position] += values[(np.int64(slot) << 16) + (keys[position] & 0xFFFF)]


@njit(nogil=True, cache=True)
def _noise(position: Any) -> Any:
    """64 bits that look random: the finaliser of splitmix64."""
    bits = position
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@njit(nogil=True, cache=True)
def round_to_bfloat16(values: Any, position: Any, stride: Any, rounded: Any) -> None:
    """Patterns of float32 (uint32) to patterns of bfloat16 (uint16), up with the probability of what is cut off.

    The noise of element i is that of position + i * stride, modulo 2^64.
    """
    for index in range(values.size):
        bits = values[index]
        noise = np.uint32(_noise(position) >> np.uint64(48))
        position += stride
        carried = np.uint16((bits + noise) >> np.uint32(16))
        # A NaN whose bits are all among those cut off would end as infinity.
        quiet = np.uint16(bits >> np.uint32(16)) | np.uint16(0x7FC0)
        rounded[index] = quiet if (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000) else carried


@njit(nogil=True, cache=True)
def round_to_float16(values: Any, position: Any, stride: Any, rounded: Any) -> None:
    """The same for float16: subnormal below 2^-14, infinite from 2^16 on."""
    for index in range(values.size):
        bits = values[index]
        noise = _noise(position)
        position += stride
        magnitude = bits & np.uint32(0x7FFFFFFF)
        if magnitude > np.uint32(0x7F800000):
            pattern = np.uint32(0x7E00)
        elif magnitude >= np.uint32(0x47800000):
            pattern = np.uint32(0x7C00)
        elif magnitude >= np.uint32(0x38800000):
            pattern = (magnitude - np.uint32(0x38000000) + np.uint32(noise >> np.uint64(51))) >> np.uint32(13)
        else:
            exponent = max(magnitude >> np.uint32(23), np.uint32(1))
            digits = np.uint64(magnitude - ((exponent - np.uint32(1)) << np.uint32(23)))
            # The value is digits * 2^-cut in units of the smallest subnormal.
            cut = np.uint64(126 - exponent)
            if cut <= np.uint64(64):
                whole = digits >> cut if cut < np.uint64(64) else np.uint64(0)
                fraction = digits - (whole << cut) if cut < np.uint64(64) else digits
                up = (noise >> (np.uint64(64) - cut)) < fraction
            else:
                whole = np.uint64(0)
                up = noise < (digits >> min(cut - np.uint64(64), np.uint64(63)))
            pattern = np.uint32(whole) + np.uint32(up)
        rounded[index] = np.uint16((bits >> np.uint32(16)) & np.uint32(0x8000)) | np.uint16(pattern)
