"""Parts of tensors: which weights they hold, and their bits."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_tickets.masks import pack
from lottery_tickets.masks._shards import Shard, _held_indices, assembled


@st.composite
def divisions(draw: st.DrawFn) -> tuple[torch.Size, list[Shard]]:
    """A shape and parts that make it up, each dimension dealt out on its own."""
    shape = torch.Size(draw(st.lists(st.integers(0, 9), max_size=3)))
    dealt = []
    for size in shape:
        hands = draw(st.integers(1, 3))
        given_to = np.array(draw(st.lists(st.integers(0, hands - 1), min_size=size, max_size=size)), np.int64)
        dealt.append([np.flatnonzero(given_to == hand) for hand in range(hands)])
    parts = [()]
    for hands in dealt:
        parts = [(*part, hand) for part in parts for hand in hands]
    return shape, [Shard(shape, part) for part in parts]


@given(divisions(), st.integers(0, 2**32 - 1))
def test_bits_are_cut_and_put_together(division, seed):
    shape, shards = division
    decisions = torch.from_numpy(np.random.default_rng(seed).random(shape.numel()) < 0.5).view(shape)
    parts = [shard.cut(pack(decisions)) for shard in shards]
    for shard, part in zip(shards, parts, strict=True):
        chosen = decisions.numpy()[np.ix_(*shard.indices)] if shape else decisions.numpy()
        assert tuple(shard.part) == chosen.shape
        assert np.array_equal(part, pack(torch.from_numpy(np.array(chosen))))
    assert np.array_equal(assembled(shape, zip(shards, parts, strict=True)), pack(decisions))


@given(divisions(), st.sampled_from([torch.bfloat16, torch.float64, torch.bool]), st.booleans())
def test_weights_are_cut_and_put_together(division, dtype, turned):
    shape, shards = division
    whole = torch.arange(shape.numel()).view(shape).to(dtype)
    if turned:  # the same weights, other strides
        whole = whole.mT.contiguous().mT if whole.dim() > 1 else whole
    again = torch.zeros_like(whole)
    for shard in shards:
        part = torch.zeros(shard.part, dtype=dtype)
        for there, here in shard.pairs(whole, part):
            here.copy_(there)
        chosen = torch.arange(shape.numel()).view(shape)
        expected = chosen[np.ix_(*shard.indices)] if shape else chosen
        assert torch.equal(part, expected.to(dtype))
        for there, here in shard.pairs(again, part):
            there.copy_(here)
    assert torch.equal(again, whole)


@given(divisions())
def test_what_comes_before_a_place_is_a_beginning_of_the_part(division):
    shape, shards = division
    places = np.arange(shape.numel()).reshape(tuple(shape))
    for shard in shards:
        held = places[np.ix_(*shard.indices)].reshape(-1) if shape else places.reshape(-1)
        for position in range(shape.numel() + 1):
            assert shard.before(position) == np.count_nonzero(held < position)


def test_many_rows_are_cut_in_blocks(monkeypatch):
    monkeypatch.setattr("lottery_tickets.masks._shards._UNPACKED", 64)
    decisions = torch.from_numpy(np.random.default_rng(0).random((61, 7)) < 0.5)
    parts = [
        (np.arange(0, 61, 2), np.arange(3)),
        (np.arange(1, 61, 2), np.arange(3)),
        (np.arange(61), np.arange(3, 7)),
    ]
    shards = [Shard(decisions.shape, part) for part in parts]
    bits = [shard.cut(pack(decisions)) for shard in shards]
    assert np.array_equal(bits[1], pack(decisions[1::2, :3]))
    assert np.array_equal(assembled(decisions.shape, zip(shards, bits, strict=True)), pack(decisions))


@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4))
def test_strided_shards_are_those_of_fsdp_over_tensor_parallelism(size, dp, tp):
    everything = torch.arange(size)

    def chunk(indices: torch.Tensor, number: int, place: int) -> torch.Tensor:
        return (*indices.chunk(number), *[indices[:0]] * number)[place]

    placements = [(0, SimpleNamespace(dim=0, split_factor=tp)), (1, SimpleNamespace(dim=0))]
    for row in range(dp):
        for column in range(tp):
            held = _held_indices(size, placements, (dp, tp), (row, column))
            assert held.tolist() == chunk(chunk(everything, tp, column), dp, row).tolist()
