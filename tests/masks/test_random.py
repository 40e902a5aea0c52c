"""Random masks: exact counts, every choice equally likely, the same bits for the same seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lottery_tickets import Mask
from lottery_tickets.masks import _bits, _random


def mask_of(*keeps: tuple[int, int]) -> Mask:
    """Tensor i has keeps[i][0] weights, the first keeps[i][1] of them kept."""
    return Mask.from_tensors(
        {f"w{index}": torch.arange(numel) < kept for index, (numel, kept) in enumerate(keeps)}
    )


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), max_size=4),
    st.integers(0, 2**64),
)
def test_counts_are_imitated(keeps, seed):
    mask = mask_of(*keeps)
    within = Mask.random_like(mask, seed)
    assert within.layer_kept() == mask.layer_kept()
    assert within.shapes == mask.shapes
    across = Mask.random_like(mask, seed, per_layer=False)
    assert (across.kept, across.shapes) == (mask.kept, mask.shapes)


def test_a_seed_gives_the_same_bits_on_every_machine():
    """The digest is part of the contract: results with a random control can be repeated anywhere."""
    mask = mask_of((1000, 300), (77, 70))
    assert Mask.random_like(mask, 0) == Mask.random_like(mask, 0)
    assert Mask.random_like(mask, 0) != Mask.random_like(mask, 1)
    assert Mask.random_like(mask, 0, per_layer=False).digest()[:16] == "1f5f72573f52f6d2"
    assert Mask.random_like(mask, 0).digest()[:16] == "35b3bedbc2c8c3af"


def test_the_order_of_the_names_does_not_matter():
    mask = mask_of((100, 30), (50, 20))
    turned = Mask.from_tensors({"w1": mask["w1"], "w0": mask["w0"]})
    assert Mask.random_like(mask, 5) == Mask.random_like(turned, 5)


def test_the_smallest_keys_go():
    """Each weight draws 64 bits of Philox, in tensors' streams; sorting them is the oracle of counting them."""
    mask = mask_of((700, 300), (300, 70))
    drawn = [
        [int(key) for key in np.random.Philox(key=9, counter=[0, 0, stream, 0]).random_raw(numel)]
        for stream, numel in enumerate((700, 300))
    ]
    ranked = sorted(
        (key, tensor, position) for tensor, keys in enumerate(drawn) for position, key in enumerate(keys)
    )
    expected = {"w0": torch.ones(700, dtype=torch.bool), "w1": torch.ones(300, dtype=torch.bool)}
    for _, tensor, position in ranked[:630]:
        expected[f"w{tensor}"][position] = False
    assert Mask.random_like(mask, 9, per_layer=False) == Mask.from_tensors(expected)


def test_tensors_draw_independently():
    mask = mask_of((4096, 2048), (4096, 2048))
    drawn = Mask.random_like(mask, 3)
    agreement = (drawn["w0"] == drawn["w1"]).double().mean().item()
    assert abs(agreement - 0.5) < 5 * 0.5 / 64


def test_every_choice_is_equally_likely():
    """All 10 choices of 2 of 5 appear alike often: chi-squared with 9 degrees of freedom, 27.9 at 1 in 1,000."""
    mask = mask_of((5, 2))
    draws = 2000
    counts: dict[bytes, int] = {}
    for seed in range(draws):
        bits = Mask.random_like(mask, seed).packed("w0").tobytes()
        counts[bits] = counts.get(bits, 0) + 1
    assert len(counts) == 10
    assert sum((count - draws / 10) ** 2 / (draws / 10) for count in counts.values()) < 27.9


def test_the_whole_is_shared_out_by_chance():
    """Without per_layer the number kept in a tensor is hypergeometric: within five standard deviations."""
    kept = Mask.random_like(mask_of((40_000, 0), (10_000, 10_000)), 7, per_layer=False).layer_kept()
    deviation = (10_000 * 0.8 * 0.2 * 40_000 / 49_999) ** 0.5
    assert abs(kept["w0"] - 8_000) < 5 * deviation


def test_blocks_do_not_repeat(monkeypatch):
    """Keys of neighbouring blocks and tensors come from streams that do not overlap."""
    monkeypatch.setattr(_bits, "BLOCK", 512)
    keys = np.concatenate([block for _, _, block in _random._keys([2048, 2048], 1, [0, 1])])
    assert np.unique(keys).size == keys.size


def test_many_blocks_keep_the_count(monkeypatch):
    monkeypatch.setattr(_bits, "BLOCK", 64)
    assert Mask.random_like(mask_of((1000, 333), (500, 1)), 2).layer_kept() == {"w0": 333, "w1": 1}


@pytest.mark.parametrize("digits", [0, 1, 3])
def test_equal_keys_are_settled_by_position(digits, monkeypatch):
    """Keys collide once in 2^64; made to collide, the count is exact all the same."""

    def keys(numels, seed, streams):
        for tensor, numel in enumerate(numels):
            yield tensor, 0, np.random.default_rng(seed).integers(0, 1 + digits, numel, dtype=np.uint64)

    monkeypatch.setattr(_random, "_keys", keys)
    for kept in (0, 1, 50, 99, 100):
        (bits,) = _random.random_bits([100], kept, seed=0, streams=[0])
        assert _bits.count(bits) == kept


def test_a_negative_seed_is_refused():
    with pytest.raises(ValueError, match="non-negative integer, got -1"):
        Mask.random_like(mask_of((4, 2)), -1)
