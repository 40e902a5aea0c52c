"""Packing bit by bit is the oracle of packing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracles
from lottery_tickets.masks import _bits, pack, packed_size, unpack_range


@st.composite
def decisions(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.one_of(st.just(()), st.lists(st.integers(0, 20), min_size=1, max_size=3).map(tuple)))
    chooser = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kept = torch.from_numpy(np.atleast_1d(chooser.random(shape) < draw(st.sampled_from((0, 0.1, 0.5, 1)))))
    kept = kept.reshape(shape)
    return kept.mT.contiguous().mT if kept.dim() > 1 and draw(st.booleans()) else kept


@given(decisions())
def test_pack_and_back(kept):
    packed = pack(kept)
    assert packed.tobytes() == oracles.packed(kept)
    assert packed.size == packed_size(kept.numel())
    assert torch.equal(_bits.unpack(packed, kept.shape), kept)
    assert _bits.count(packed) == int(kept.sum())
    assert not _bits.has_bits_beyond(packed, kept.numel())


@given(decisions(), st.data())
def test_unpack_range(kept, data):
    start = 8 * data.draw(st.integers(0, kept.numel() // 8))
    stop = data.draw(st.integers(start, kept.numel()))
    assert torch.equal(unpack_range(pack(kept), start, stop), kept.reshape(-1)[start:stop])


@pytest.mark.parametrize("numel", range(1, 18))
def test_bits_beyond_the_end(numel):
    packed = np.full(packed_size(numel), 0xFF, np.uint8)
    assert _bits.has_bits_beyond(packed, numel) == (numel % 8 != 0)
    _bits.clear_bits_beyond(packed, numel)
    assert packed.tobytes() == oracles.packed(torch.ones(numel))


def test_counts_over_several_blocks():
    chooser = np.random.default_rng(0)
    first, second = (chooser.integers(0, 256, 2 * _bits.BLOCK + 3, dtype=np.uint8) for _ in range(2))
    assert _bits.count(first) == int(np.unpackbits(first).sum(dtype=np.int64))
    assert _bits.count_common(first, second) == int(np.unpackbits(first & second).sum(dtype=np.int64))
