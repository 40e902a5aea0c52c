"""How much goes where: counts, floors, shares by importance."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lottery_tickets.errors import SparsityError
from lottery_tickets.sparsity import (
    Selection,
    Sorting,
    bits_above_floor,
    check_sparsity,
    removals_by_weight,
    removed_count,
)
from strategies import sparsities, weights

densities = st.sampled_from((0.0, 0.01, 0.07, 0.1, 0.3, 0.5, 0.9, 0.999))


@given(sparsities(), st.integers(0, 10**12))
def test_removed_count(sparsity, numel):
    assert removed_count(sparsity, numel) == round(sparsity * numel)
    assert 0 <= removed_count(sparsity, numel) <= numel


@pytest.mark.parametrize(
    ("sparsity", "numel", "removed"), [(0.29, 100, 29), (0.5, 5, 2), (0.5, 7, 4), (0.9, 1, 1)]
)
def test_removed_count_by_hand(sparsity, numel, removed):
    assert removed_count(sparsity, numel) == removed


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.0, 90, float("nan"), float("inf"), "0.5", None, True, [0.5]])
def test_what_is_no_sparsity_is_refused(sparsity):
    with pytest.raises(SparsityError, match=r"density is the fraction removed, a number in \[0, 1\); got"):
        check_sparsity(sparsity, "density")


@settings(max_examples=100)
@given(weights(), sparsities(), densities)
def test_floors_equal_passing_over_full_tensors(tensors, sparsity, min_density):
    removed = round(sparsity * sum(tensor.numel() for tensor in tensors.values()))
    expected = oracles.floored_mask(tensors, removed, min_density)
    for make in (Selection, Sorting):
        if expected is None:
            with pytest.raises(SparsityError, match=f"Cannot remove {removed} weights: min_density={min_density}"):
                bits_above_floor(tensors, removed, min_density, make)
        else:
            found = bits_above_floor(tensors, removed, min_density, make)
            assert {name: bits.tobytes() for name, bits in found.items()} == {
                name: oracles.packed(mask) for name, mask in expected.items()
            }


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.integers(0, 1000), st.floats(2**-30, 2**30)), min_size=1, max_size=8),
    st.floats(0, 1),
)
def test_shares_by_importance(layers, share):
    numels = {f"layer{index}": numel for index, (numel, _) in enumerate(layers)}
    importance = {f"layer{index}": weight for index, (_, weight) in enumerate(layers)}
    removed = round(share * sum(numels.values()))
    found = removals_by_weight(numels, importance, removed)
    assert found == oracles.removals_by_weight(numels, importance, removed)
    assert sum(found.values()) == removed
    assert all(0 <= found[name] <= numels[name] for name in numels)


def test_shares_by_importance_by_hand():
    """Densities 1/2 and 1/4 of equal layers keep 75 of 200; with a cap at 1 the rest goes to the other."""
    assert removals_by_weight({"a": 100, "b": 100}, {"a": 2.0, "b": 1.0}, 125) == {"a": 50, "b": 75}
    assert removals_by_weight({"a": 100, "b": 100}, {"a": 9.0, "b": 1.0}, 50) == {"a": 0, "b": 50}


def test_equal_importance_is_equal_density():
    numels = {"a": 100, "b": 300, "empty": 0}
    removals = removals_by_weight(numels, dict.fromkeys(numels, 1.0), 100)
    assert {name: Fraction(removals[name], numels[name]) for name in ("a", "b")} == {
        "a": Fraction(1, 4),
        "b": Fraction(1, 4),
    }
