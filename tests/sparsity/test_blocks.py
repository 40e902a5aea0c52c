"""Weights as blocks of integers: each weight once, in order, whatever the strides, data types and devices."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

import oracles
from lottery_tickets.sparsity import _blocks, _counting, _moments
from lottery_tickets.sparsity._blocks import Weights, common_dtype, flat_range, for_each, pattern_of
from strategies import DTYPES, tensors, weights


@settings(max_examples=100)
@given(tensors(nan=True).filter(lambda tensor: tensor.numel()), st.data())
def test_flat_range_is_row_major(tensor, data):
    stop = data.draw(st.integers(1, tensor.numel()))
    start = data.draw(st.integers(0, stop - 1))
    found = flat_range(tensor, start, stop)
    assert oracles.bytes_of(found) == oracles.bytes_of(tensor.contiguous().reshape(-1)[start:stop])


def test_flat_range_of_a_broadcast_tensor():
    row = torch.arange(5.0)
    assert flat_range(row.expand(4, 5), 3, 12).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@settings(max_examples=60)
@given(weights())
def test_blocks_hold_every_weight_once(named):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "_LARGEST_BLOCK", 64)
        patch.setattr(_blocks, "_SMALLEST_BLOCK", 64)
        cut = Weights(named)
    for index, tensor in enumerate(named.values()):
        pieces = [cut.integers(block) for block in cut.blocks if block.tensor == index]
        values = [value for piece in pieces for value in oracles.flat(piece.view(cut.dtype))]
        assert values == oracles.flat(tensor)
    assert all(block.start % 64 == 0 and block.stop - block.start <= 64 for block in cut.blocks)


def test_contiguous_weights_are_not_copied():
    tensor = torch.randn(100, 100)
    cut = Weights({"w": tensor})
    assert cut.integers(cut.blocks[0]).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    ("dtypes", "common"),
    [
        ((), torch.float32),
        ((torch.bfloat16,), torch.bfloat16),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float64), torch.float64),
    ],
)
def test_common_dtype_holds_every_value(dtypes, common):
    assert common_dtype(dtypes) == common


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nan_first", [False, True])
def test_keys_order_as_magnitudes_do(dtype, nan_first):
    values = [0.0, 2.0**-14, 1.0, 1.5, 65280.0, float("inf")]
    cut = Weights({"w": torch.tensor(values, dtype=dtype)}, nan_first=nan_first)
    keys = cut.integers(cut.blocks[0]).tolist()
    assert keys == sorted(keys)
    assert [cut.value_of(key) for key in keys] == values
    assert keys[-1] == cut.infinity == pattern_of(float("inf"), dtype) + nan_first


@pytest.mark.parametrize("threads", [1, 2, 16, 128])
@pytest.mark.parametrize("buffers", [2, 16])
def test_blocks_in_flight_stay_within_the_scratch_memory(threads, buffers, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for dtype in DTYPES:
        size = _blocks.block_size(dtype, buffers)
        together = threads * buffers * dtype.itemsize
        assert size % 64 == 0
        assert together * size <= max(32 << 20, together * (1 << 14))


def test_for_each_keeps_the_order_and_passes_errors_on():
    assert for_each(lambda number: number**2, list(range(100))) == [number**2 for number in range(100)]
    with pytest.raises(ZeroDivisionError):
        for_each(lambda number: 1 // number, [2, 1, 0])


def test_an_error_ends_the_other_threads_too():
    done = []

    def work(number):
        if number == 0:
            raise ValueError("first")
        time.sleep(0.001)
        done.append(number)

    with pytest.raises(ValueError, match="first"):
        for_each(work, range(2000))
    assert len(done) < 1000


def test_a_bar_appears_only_where_a_name_is_given(monkeypatch):
    shown = []

    def recorded(**options):
        shown.append((options["desc"], options["delay"], options["disable"]))
        return tqdm(**options)

    monkeypatch.setattr(_blocks, "tqdm", recorded)
    for_each(abs, [1, 2])
    for_each(abs, [1, 2], progress="counting")
    assert shown == [(None, 2, True), ("counting", 2, False)]


@settings(max_examples=60)
@given(st.integers(0, 300_000), st.integers(1, 400), st.integers(0, 40))
def test_a_sample_spreads_evenly(numel, runs, turn):
    numel = max(numel, 1)
    found = _blocks._evenly_spread(torch.arange(numel), runs, turn).reshape(-1)
    assert found.numel() == found.unique().numel()  # no weight twice
    assert found.numel() >= min(numel, runs * 16)
    if found.numel() < numel:
        assert found.numel() <= 3 * 32 * runs
        gaps = torch.diff(found, prepend=torch.tensor([0]), append=torch.tensor([numel]))
        assert gaps.max() <= 3 * numel / runs + 64


# --- torch's version for other devices, against the compiled one ---

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=100)
@given(tensors(nan=True), st.data())
def test_torch_and_compiled_loops_agree(device, values, data):
    integers = values.contiguous().view(-1).view(_blocks.INTEGERS[values.dtype])
    there = integers.to(device)
    top = int(torch.iinfo(integers.dtype).max)
    present = [int(value) & top for value in integers[:20].tolist()]
    keys = st.one_of(st.integers(0, top), st.sampled_from(present)) if present else st.integers(0, top)

    thresholds = [*data.draw(st.lists(keys, max_size=4)), -1]
    assert np.array_equal(_counting._above_torch(there, thresholds), _counting.above(integers, thresholds))

    shift = top.bit_length() - 15
    leading = _counting.leading_bits(integers, shift, 1 << 15)
    assert np.array_equal(_counting._leading_bits_torch(there, shift, 1 << 15), leading)

    if shift:
        low = (data.draw(keys) >> shift) << shift
        inside = low, low + (1 << shift) - 1, shift - 16
        if inside[2] >= 0 and shift - inside[2] <= 16:
            assert np.array_equal(
                _counting._bits_inside_torch(there, *inside), _counting.bits_inside(integers, *inside)
            )

    low, high = sorted([data.draw(keys), data.draw(keys)])
    span = low, high, max(0, (high - low).bit_length() - 8), (3, 0xFFF), (0, 0xFFFF)
    assert np.array_equal(_counting._moments_torch(there, *span), _counting.moments(integers, *span))
    stored = _moments._STORED[values.dtype]
    sums = _counting.digit_sums(integers, stored, (2, 0xFFFF))
    assert np.array_equal(_counting._digit_sums_torch(there, stored, (2, 0xFFFF), sums.size), sums)

    key, ties = data.draw(keys), data.draw(st.integers(0, integers.numel()))
    packed = np.zeros((integers.numel() + 7) // 8, np.uint8)
    _counting.pack_kept(integers, key, ties, packed)
    assert _counting._pack_kept_torch(there, key, ties).cpu().numpy().tobytes() == packed.tobytes()

    if shift:
        prefixes = _counting.Ladder(sorted({key >> shift for key in data.draw(st.lists(keys, min_size=1))}), 15)
        digits = prefixes, shift, shift - 8
        expected = _counting.bits_by_prefix(integers, *digits)
        assert np.array_equal(_counting._bits_by_prefix_torch(there, *digits), expected)

    edges = _counting.Ladder(sorted(data.draw(st.lists(keys, max_size=255))), top.bit_length())
    assert np.array_equal(_counting._rank_among_torch(there, edges), _counting.rank_among(integers, edges))
