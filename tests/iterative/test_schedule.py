"""How many weights are gone after each round."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lottery_tickets._iterative._schedule import Group, groups_of
from lottery_tickets.errors import SparsityError
from lottery_tickets.sparsity import removed_count

LENET = {"1.weight": 235_200, "3.weight": 30_000, "5.weight": 1_000}


def grouped(numels: dict[str, int] = LENET, **options: Any) -> list[Group]:
    plain = {
        "rounds": 10,
        "target_sparsity": 0.9,
        "prune_fraction": None,
        "layer_fractions": {},
        "by_layer": False,
    }
    return groups_of(numels, **{**plain, **options})


def totals(groups: list[Group]) -> list[int]:
    return [sum(numbers) for numbers in zip(*(group.removed for group in groups), strict=True)]


sizes = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 10_000), min_size=1)
fractions = st.floats(0.001, 0.999)
rounds = st.integers(1, 40)


@given(sizes, fractions, rounds, st.booleans())
def test_densities_are_geometric_and_end_at_the_target(
    numels: dict[str, int], target: float, count: int, by_layer: bool
) -> None:
    for group in grouped(numels, target_sparsity=target, rounds=count, by_layer=by_layer):
        numel = sum(numels[name] for name in group.names)
        assert len(group.removed) == count + 1
        assert group.removed[0] == 0
        assert group.removed[-1] == removed_count(target, numel)
        assert all(one <= after for one, after in pairwise(group.removed))
        for number, removed in enumerate(group.removed):
            assert abs(numel - removed - numel * (1 - target) ** (number / count)) < 0.5 + 1e-6


@given(sizes, fractions, rounds, st.booleans())
def test_a_fraction_takes_that_much_of_what_is_left(
    numels: dict[str, int], fraction: float, count: int, by_layer: bool
) -> None:
    left = Fraction(str(fraction))
    for group in grouped(numels, prune_fraction=fraction, rounds=count, by_layer=by_layer):
        numel = sum(numels[name] for name in group.names)
        for number, removed in enumerate(group.removed):
            assert abs(numel - removed - numel * (1 - left) ** number) <= Fraction(1, 2) + Fraction(1, 10**6)


def test_the_papers_setting():
    """Layer by layer 20 percent a round, the output layer at half the rate (Frankle and Carbin 2019, figure 2)."""
    groups = grouped(by_layer=True, prune_fraction=0.2, layer_fractions={"5.*": 0.1}, rounds=18)
    assert {group.names[0]: group.removed[1] for group in groups} == {
        "5.weight": 100,
        "1.weight": 47_040,
        "3.weight": 6_000,
    }
    density = 1 - totals(groups)[-1] / sum(LENET.values())
    assert density == pytest.approx(0.0185, abs=0.0005)


@given(sizes, fractions, rounds, st.booleans(), st.floats(0, 0.3))
def test_the_others_make_up_for_tensors_with_a_fraction_of_their_own(
    numels: dict[str, int], target: float, count: int, by_layer: bool, fraction: float
) -> None:
    named = next(iter(numels))
    options = {"target_sparsity": target, "rounds": count, "layer_fractions": {named: fraction}}
    assume(len(numels) > 1)
    try:
        groups = grouped(numels, by_layer=by_layer, **options)
    except SparsityError:
        assume(False)
    (own,) = (group for group in groups if group.names == (named,))
    for number, removed in enumerate(own.removed):
        assert removed == removed_count(1 - (1 - fraction) ** number, numels[named])
    (whole,) = grouped(numels, target_sparsity=target, rounds=count)
    assert totals(groups) == list(whole.removed), "the total is what it would be without"
    assert all(one <= after for group in groups for one, after in pairwise(group.removed))
    assert sorted(name for group in groups for name in group.names) == sorted(numels)
    assert all(group.removed[-1] <= sum(numels[name] for name in group.names) for group in groups)


@pytest.mark.parametrize(
    ("fractions", "said"),
    [
        ({"9.*": 0.1}, "matches none"),
        ({"5.*": 0.1, "*.weight": 0.2}, "both match 5.weight"),
        ({"1.*": 0.6, "3.*": 0.6}, "contradict each other: in round 1"),
        ({"1.*": 0.0}, "contradict each other: in round"),
    ],
)
def test_fractions_that_cannot_be(fractions: dict[str, float], said: str) -> None:
    with pytest.raises(SparsityError, match=said):
        grouped(layer_fractions=fractions)
