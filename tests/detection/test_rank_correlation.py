"""Rank correlation by counting, against scipy on the same buckets and on the magnitudes themselves."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

import oracles
from lottery_tickets.detection import MagnitudeRanks
from lottery_tickets.detection._rank_correlation import correlation_of
from lottery_tickets.errors import DetectionError, WeightsError
from processes import PEAK, run_python
from strategies import DTYPES, weights


def magnitudes_of(tensors):
    return [abs(value) for tensor in tensors.values() for value in oracles.flat(tensor)]


def plain_buckets(magnitudes):
    """How many of the 255 quantile magnitudes lie below each."""
    ascending = sorted(magnitudes)
    edges = (
        [ascending[math.ceil(len(ascending) * bucket / 256) - 1] for bucket in range(1, 256)] if ascending else []
    )
    return [sum(edge < magnitude for edge in edges) for magnitude in magnitudes]


def plain_spearman(first, second):
    """scipy's, and None for what it has no number for."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


@st.composite
def moved(draw, tensors):
    """The same tensors with some weights at other values of the same tensors, or all where they were."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    share = draw(st.sampled_from((0.0, 0.1, 1.0)))
    after = {}
    for name, tensor in tensors.items():
        values = tensor.clone(memory_format=torch.contiguous_format)
        flat = values.view(-1)
        chosen = np.flatnonzero(generator.random(flat.numel()) < share)
        flat[chosen] = flat[generator.permutation(chosen)]
        after[name] = values
    return after


@settings(max_examples=40)
@given(weights(), st.data())
def test_it_is_spearmans_of_the_buckets(before, data):
    after = data.draw(moved(before))
    ranks = MagnitudeRanks(before)
    assert ranks.update(before) is None
    found = ranks.update(after)
    buckets = [plain_buckets(magnitudes_of(tensors)) for tensors in (before, after)]
    assert [int(rank) for rank in torch.cat([*ranks.state_dict()["tensors"].values(), torch.empty(0)])] == buckets[
        1
    ]
    expected = plain_spearman(*buckets)
    assert found is expected is None or found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 3.0])
def test_it_is_close_to_spearmans_of_the_magnitudes(dtype, share):
    """256 ranks stand for 200,000: less than a thousandth off, and 1 for what did not move."""
    generator = torch.Generator().manual_seed(0)
    before, noise = (torch.randn(200_000, generator=generator) for _ in range(2))
    after = (before + share * noise).to(dtype)
    before = before.to(dtype)
    ranks = MagnitudeRanks({"w": before})
    ranks.update({"w": before})
    found = ranks.update({"w": after})
    exact = spearmanr(before.abs().double(), after.abs().double()).statistic
    assert found == pytest.approx(exact, abs=1e-3)
    if not share:
        assert found == 1.0


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=60))
def test_tables_with_few_ranks(pairs):
    table = np.zeros((6, 6), np.int64)
    for pair in pairs:
        table[pair] += 1
    expected = plain_spearman(*zip(*pairs, strict=True))
    found = correlation_of(table)
    assert found is expected is None or found == pytest.approx(expected, abs=1e-12)


def test_counts_of_a_huge_model_lose_nothing():
    """Ranks of 10^12 weights: what agrees is 1, what is turned about is -1, whatever the sums."""
    counts = np.full(256, 10**12 // 256, np.int64)
    assert correlation_of(np.diag(counts)) == 1.0
    assert correlation_of(np.diag(counts)[::-1]) == -1.0
    assert correlation_of(np.outer(counts[:16], np.ones(256, np.int64))) == 0.0


@pytest.mark.parametrize("alike", [torch.zeros(1000), torch.full((1000,), -2.5), torch.ones(1), torch.ones(0)])
def test_ranks_that_are_all_alike_have_no_correlation(alike):
    ranks = MagnitudeRanks({"w": alike})
    ranks.update({"w": alike})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ranks.update({"w": alike}) is None
        assert ranks.update({"w": torch.arange(float(alike.numel()))}) is None
    if alike.numel() > 1:
        assert ranks.update({"w": torch.arange(float(alike.numel()))}) == 1.0


def test_equal_magnitudes_share_a_rank():
    """Zeros of a pruned model and -0.0, and weights of either sign."""
    values = torch.tensor([0.0, -0.0, 1.0, -1.0, 0.0, 2.0]).repeat(50)
    ranks = MagnitudeRanks({"w": values})
    ranks.update({"w": values})
    found = ranks.state_dict()["tensors"]["w"]
    assert [len(found[values.abs() == magnitude].unique()) for magnitude in (0, 1, 2)] == [1, 1, 1]
    assert len(found.unique()) == 3


def test_weights_within_one_histogram_bin_are_told_apart():
    """Magnitudes that agree in their leading bits, as those of a norm's gain do."""
    before = 1 + torch.arange(2560) * 2.0**-23
    ranks = MagnitudeRanks({"w": before})
    ranks.update({"w": before})
    assert len(ranks.state_dict()["tensors"]["w"].unique()) == 256
    assert ranks.update({"w": before.flip(0)}) == -1.0


@settings(max_examples=30)
@given(weights(), st.data())
def test_ranks_saved_and_loaded_go_on(tmp_path_factory, before, data):
    after = data.draw(moved(before))
    whole, halved = MagnitudeRanks(before), MagnitudeRanks(before)
    halved.load_state_dict(halved.state_dict())
    whole.update(before)
    halved.update(before)
    path = tmp_path_factory.mktemp("run") / "ranks.safetensors"
    save_file(halved.state_dict()["tensors"], path)
    loaded = MagnitudeRanks(before)
    loaded.load_state_dict({"tensors": load_file(path)})
    assert loaded.update(after) == whole.update(after)
    state = whole.state_dict()["tensors"]
    assert list(state) == list(before)
    assert all(torch.equal(ranks, loaded.state_dict()["tensors"][name]) for name, ranks in state.items())


def test_a_loaded_state_is_not_shared():
    first, second = (MagnitudeRanks({"w": torch.arange(4.0)}) for _ in range(2))
    first.update({"w": torch.arange(4.0)})
    second.load_state_dict(first.state_dict())
    second.update({"w": torch.arange(4.0).flip(0)})
    assert first.update({"w": torch.arange(4.0)}) == 1.0


@pytest.mark.parametrize(
    "tensors",
    [{"v": torch.zeros(3, dtype=torch.uint8)}, {"w": torch.zeros(2, dtype=torch.uint8)}, {"w": torch.zeros(3)}],
)
def test_a_state_of_other_tensors(tensors):
    with pytest.raises(DetectionError, match="w"):
        MagnitudeRanks({"w": torch.zeros(3)}).load_state_dict({"tensors": tensors})


def test_other_tensors_than_before():
    ranks = MagnitudeRanks({"w": torch.zeros(3)})
    with pytest.raises(WeightsError, match="w"):
        ranks.update({"w": torch.zeros(4)})
    with pytest.raises(WeightsError, match="v"):
        ranks.update({"w": torch.zeros(3), "v": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"NaN.*w \(1\)"):
        ranks.update({"w": torch.tensor([1.0, math.nan, 2.0])})
    assert not ranks.state_dict()["tensors"]


def test_the_number_of_threads_changes_no_bit():
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(700, 1000, generator=generator) for name in ("a", "b", "c")}
    after = {name: tensor + 0.1 * torch.randn(700, 1000, generator=generator) for name, tensor in before.items()}
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            ranks = MagnitudeRanks(before)
            ranks.update(before)
            found.append(ranks.update(after))
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_a_check_takes_a_byte_a_weight():
    code = f"""{PEAK}
import torch
from lottery_tickets.detection import MagnitudeRanks
small = {{"w": torch.randn(1 << 20)}}
warm = MagnitudeRanks(small); warm.update(small); warm.update(small)
weights = {{str(index): torch.randn(4 << 20) for index in range(12)}}
before = peak()
ranks = MagnitudeRanks(weights)
ranks.update(weights); ranks.update(weights)
print(peak() - before)
"""
    numel = 12 * (4 << 20)
    assert int(run_python(code)) < numel + (40 << 20)
