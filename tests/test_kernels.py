"""The compiled loops against numpy, at the lengths where words of 64 begin and end."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery_tickets import _kernels
from lottery_tickets.sparsity import _counting

KINDS = (np.int16, np.int32, np.int64)
SIZES = st.one_of(st.sampled_from((0, 1, 7, 8, 9, 63, 64, 65, 127, 128, 129, 192)), st.integers(0, 400))


@st.composite
def integers(draw: st.DrawFn) -> np.ndarray:
    """Weights as integers: few distinct ones, the extremes of the type among them."""
    kind = np.iinfo(draw(st.sampled_from(KINDS)))
    some = st.sampled_from((kind.min, kind.min + 1, -1, 0, 1, kind.max - 1, kind.max))
    palette = draw(st.lists(st.one_of(some, st.integers(kind.min, kind.max)), min_size=1, max_size=8))
    chooser = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return chooser.choice(np.array(palette, kind.dtype), draw(SIZES))


def magnitudes_of(weights: np.ndarray) -> np.ndarray:
    return weights & np.iinfo(weights.dtype).max


def keys_of(weights: np.ndarray) -> st.SearchStrategy[int]:
    top = int(np.iinfo(weights.dtype).max)
    anything = st.integers(0, top)
    return st.one_of(anything, st.sampled_from(magnitudes_of(weights).tolist())) if weights.size else anything


@settings(max_examples=200)
@given(integers(), st.data())
def test_pack_kept(weights, data):
    key = data.draw(keys_of(weights))
    ties = data.draw(st.integers(0, weights.size + 1))
    magnitudes = magnitudes_of(weights)
    equal = magnitudes == key
    kept = (magnitudes > key) | (equal & (np.cumsum(equal) > ties))
    packed = np.full((weights.size + 7) // 8, 0xAA, np.uint8)
    _kernels.pack_kept(weights, weights.dtype.type(key), ties, packed)
    assert packed.tobytes() == np.packbits(kept, bitorder="little").tobytes()


@settings(max_examples=100)
@given(integers(), st.data())
def test_count_above(weights, data):
    thresholds = np.array([*data.draw(st.lists(keys_of(weights), max_size=5)), -1], weights.dtype)
    counts = np.full(thresholds.size, 3, np.int64)
    _kernels.count_above(weights, thresholds, counts)
    assert counts.tolist() == [3 + int((magnitudes_of(weights) > one).sum()) for one in thresholds]


@settings(max_examples=200)
@given(integers(), st.data())
def test_count_bracket(weights, data):
    low, high = sorted([data.draw(keys_of(weights)), data.draw(keys_of(weights))])
    top = data.draw(keys_of(weights))
    counts = np.zeros(5, np.int64)
    inside = np.empty_like(weights)
    integer = weights.dtype.type
    stored = _kernels.count_bracket(weights, integer(low), integer(high), integer(top), counts, inside)
    found = magnitudes_of(weights)
    around = [(found >= low), (found > low), (found >= high), (found > high), (found > top)]
    assert counts.tolist() == [int(part.sum()) for part in around]
    assert inside[:stored].tolist() == found[(found > low) & (found < high)].tolist()


@settings(max_examples=100)
@given(integers(), st.integers(0, 14))
def test_histogram(weights, more):
    shift = weights.itemsize * 8 - 1 - 15 + more
    bins = 1 << (15 - more)
    ways = np.zeros(_kernels.WAYS * (bins + _kernels.STRIDE_PADDING), np.int32)
    _kernels.histogram(weights, shift, ways)
    counts = ways.reshape(_kernels.WAYS, -1)[:, :bins].sum(axis=0)
    assert counts.tolist() == np.bincount(magnitudes_of(weights) >> shift, minlength=bins).tolist()


@settings(max_examples=200)
@given(integers(), st.data())
def test_histogram_inside(weights, data):
    low, high = sorted([data.draw(keys_of(weights)), data.draw(keys_of(weights))])
    shift = max(0, (high - low).bit_length() - 10)
    bins = np.zeros((high - low >> shift) + 1, np.int64)
    integer = weights.dtype.type
    _kernels.histogram_inside(weights, integer(low), integer(high), shift, bins)
    found = magnitudes_of(weights)
    inside = found[(found >= low) & (found <= high)].astype(np.int64) - low
    assert bins.tolist() == np.bincount(inside >> shift, minlength=bins.size).tolist()


digits = st.tuples(st.integers(0, 20), st.integers(0, 0xFFFF))


@settings(max_examples=200)
@given(integers(), st.data(), digits, digits)
def test_moments(weights, data, first, second):
    """Of all magnitudes by their leading bits, and of those in a range."""
    low, high = sorted([data.draw(keys_of(weights)), data.draw(keys_of(weights))])
    shift = weights.itemsize * 8 - 1 - 15
    integer, found = weights.dtype.type, magnitudes_of(weights).tolist()
    table = np.zeros((1 << 15, 4), np.int64)
    _kernels.moments(weights, shift, first, second, table)
    finer = max(0, (high - low).bit_length() - 10)
    inside = np.zeros(((high - low >> finer) + 1, 4), np.int64)
    _kernels.moments_inside(weights, integer(low), integer(high), finer, first, second, inside)
    for made, start, end, bits in ((table, 0, 1 << 63, shift), (inside, low, high, finer)):
        expected: dict[int, list[int]] = {}
        for one in found:
            if start <= one <= end:
                sums = expected.setdefault(one - start >> bits, [0, 0, 0, 0])
                parts = [one >> place & mask for place, mask in (first, second)]
                sums[:3] = sums[0] + 1, sums[1] + parts[0], sums[2] + parts[0] * parts[1]
        assert {cell: made[cell].tolist() for cell in np.flatnonzero(made[:, 0]).tolist()} == expected


@settings(max_examples=100)
@given(integers(), st.integers(0, 30), st.integers(0, (1 << 27) - 1))
def test_sum_digits(weights, place, mask):
    stored = {2: 10, 4: 23, 8: 52}[weights.itemsize]
    exponents = 1 << (weights.itemsize * 8 - 1 - stored)
    ways = np.zeros(_kernels.WAYS * (exponents + _kernels.STRIDE_PADDING), np.int64)
    _kernels.sum_digits(weights, stored, place, mask, ways)
    expected = [0] * exponents
    for magnitude in magnitudes_of(weights).tolist():
        exponent = magnitude >> stored
        significand = magnitude % (1 << stored) + (bool(exponent) << stored)
        expected[exponent] += significand >> place & mask
    assert ways.reshape(_kernels.WAYS, -1)[:, :exponents].sum(axis=0).tolist() == expected


@settings(max_examples=100)
@given(integers(), st.integers(0, 2**32 - 1), st.booleans())
def test_keep(weights, seed, in_place):
    kept = np.random.default_rng(seed).random(weights.size) < 0.5
    expected = np.where(kept, weights, 0)
    target = weights if in_place else np.full_like(weights, -5)
    _kernels.keep(weights, np.packbits(kept, bitorder="little"), target)
    assert target.tobytes() == expected.astype(weights.dtype).tobytes()


@pytest.mark.parametrize("kind", [np.int8, *KINDS])
def test_keep_at_any_width(kind):
    """Masks are applied to weights of eight bits too."""
    weights = np.arange(-100, 30, dtype=kind)
    target = np.empty_like(weights)
    _kernels.keep(weights, np.packbits(weights % 3 == 0, bitorder="little"), target)
    assert target.tolist() == [value if value % 3 == 0 else 0 for value in weights.tolist()]


def test_weights_need_not_be_aligned_to_words():
    """A tensor's memory may begin anywhere, as those of a mapped file do."""
    memory = np.arange(300, dtype=np.int16)
    for offset in range(1, 5):
        counts = np.zeros(1, np.int64)
        _kernels.count_above(memory[offset:], np.array([150], np.int16), counts)
        assert counts[0] == 149


@pytest.mark.parametrize(
    "kernel", ["pack_kept", "count_above", "count_bracket", "histogram", "histogram_inside", "moments", "keep"]
)
def test_kernels_let_other_threads_run_and_are_cached(kernel):
    compiled = getattr(_kernels, kernel)
    assert compiled.targetoptions["nogil"]
    assert type(compiled._cache).__name__ == "FunctionCache"


@st.composite
def ladders(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, int]:
    """Weights, ascending numbers that some of their prefixes are, where these start, and both shifts."""
    weights = draw(integers())
    width = weights.itemsize * 8 - 1
    middle = draw(st.integers(0, width - 15))
    drawn = draw(st.lists(keys_of(weights), max_size=12))
    numbers = np.unique(np.array(drawn, np.int64) >> middle)
    ladder = _counting.Ladder(numbers.tolist(), width - middle)
    return weights, ladder.rungs, ladder.starts, ladder.shift, middle


@settings(max_examples=200)
@given(ladders(), st.data())
def test_histogram_by_prefix(ladder, data):
    weights, rungs, starts, shift, middle = ladder
    low = max(0, middle - data.draw(st.integers(0, 8)))
    bins = np.zeros(rungs.size << (middle - low), np.int32)
    _kernels.histogram_by_prefix(weights, rungs, starts, shift + middle, middle, low, bins)
    expected = [
        [
            int(((magnitudes_of(weights) >> low) == (prefix << (middle - low)) + digit).sum())
            for digit in range(width)
        ]
        for width in [1 << (middle - low)]
        for prefix in rungs[:-1].tolist()
    ]
    assert bins.reshape(rungs.size, -1)[:-1].tolist() == expected


@settings(max_examples=200)
@given(integers(), st.data())
def test_rank_among(weights, data):
    edges = sorted(data.draw(st.lists(keys_of(weights), max_size=255)))
    ladder = _counting.Ladder(edges, weights.itemsize * 8 - 1)
    ranks = np.empty(weights.size, np.uint8)
    _kernels.rank_among(weights, ladder.rungs, ladder.starts, ladder.shift, ranks)
    assert ranks.tolist() == [
        sum(edge < magnitude for edge in edges) for magnitude in magnitudes_of(weights).tolist()
    ]


@given(st.lists(st.tuples(st.integers(0, 255), st.integers(0, 255)), max_size=300))
def test_count_pairs(pairs):
    first, second = (np.array([pair[side] for pair in pairs], np.uint8) for side in (0, 1))
    counts = np.zeros((256, 256), np.int32)
    _kernels.count_pairs(first, second, counts)
    assert counts.sum() == len(pairs)
    assert all(counts[pair] == pairs.count(pair) for pair in pairs)
