"""How much goes where: counts, floors, shares by importance."""

from __future__ import annotations

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import oracles
from lottery_tickets.errors import SparsityError
from lottery_tickets.sparsity import (
    Selection,
    Selector,
    Sorting,
    bits_above_floor,
    check_sparsity,
    erk_removals,
    given_removals,
    lamp_removals,
    outlier_removals,
    outlier_shares,
    removals_by_weight,
    removed_count,
    uniform_removals,
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
    numels = {name: tensor.numel() for name, tensor in tensors.items()}
    for kind in (Selection, Sorting):

        def make(names: Iterable[str], kind: type = kind) -> Selector:
            return kind({name: tensors[name] for name in names})

        if expected is None:
            with pytest.raises(SparsityError, match=f"Cannot remove {removed} weights: min_density={min_density}"):
                bits_above_floor(numels, removed, min_density, make)
        else:
            found = bits_above_floor(numels, removed, min_density, make)
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


# --- Rules of allocation ---

shape_lists = st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=4).map(tuple), min_size=1, max_size=8)


def named(values):
    return {f"layers.{index}.weight": value for index, value in enumerate(values)}


def numels_of(shapes):
    return {name: math.prod(shape) for name, shape in shapes.items()}


def most_of(numels):
    return sum(max(numel - 1, 0) for numel in numels.values())


def assert_spread(removals, numels, removed):
    """The total is exact, and no tensor is emptied."""
    assert list(removals) == list(numels)
    assert sum(removals.values()) == removed
    assert all(0 <= removals[name] <= max(numel - 1, 0) for name, numel in numels.items())


@settings(max_examples=100)
@given(shape_lists, st.floats(0, 1))
def test_uniform(shapes, share):
    numels = numels_of(named(shapes))
    removed = round(share * most_of(numels))
    found = uniform_removals(numels, removed)
    assert_spread(found, numels, removed)
    sparsity = Fraction(removed, sum(numels.values()))
    if all(numel * (1 - sparsity) >= 1 for numel in numels.values()):
        exact = {name: sparsity * numel for name, numel in numels.items()}
        assert found == oracles.by_largest_remainder(exact, removed)


@settings(max_examples=200)
@given(shape_lists, st.floats(0, 1))
def test_erk_is_rigls_iteration(shapes, share):
    shapes = named(shapes)
    numels = numels_of(shapes)
    removed = round(share * most_of(numels))
    found = erk_removals(shapes, removed)
    assert_spread(found, numels, removed)
    densities = oracles.erk_densities(shapes, 1 - Fraction(removed, sum(numels.values())))
    if all(densities[name] * numel >= 1 for name, numel in numels.items()):  # else the last weight is held back
        exact = {name: (1 - densities[name]) * numel for name, numel in numels.items()}
        assert found == oracles.by_largest_remainder(exact, removed)


def test_erk_by_hand():
    """Equal factors would keep 2/5 and 1/25 of 10 x 10 and 100 x 100 times a factor; the small one fills up."""
    shapes = {"small": (10, 10), "large": (100, 100)}
    assert erk_removals(shapes, 9000) == {"small": 0, "large": 9000}
    # Kept 0.02 * (20, 200) / 0.2 of the dims: 10 and 100 of 110 in all.
    assert erk_removals(shapes, 10100 - 110) == {"small": 90, "large": 9900}


@settings(max_examples=100)
@given(shape_lists, st.data())
def test_given_sparsities(shapes, data):
    numels = numels_of(named(shapes))
    given = {
        name: data.draw(st.sampled_from((0.0, 0.1, 0.29, 0.5, 0.99)))
        for name in data.draw(st.sets(st.sampled_from(list(numels))))
    }
    others = {name: numel for name, numel in numels.items() if name not in given}
    assume(others)
    fixed = {name: min(round(Fraction(str(s)) * numels[name]), numels[name] - 1) for name, s in given.items()}
    left = data.draw(st.integers(0, most_of(others)))
    found = given_removals(numels, given, sum(fixed.values()) + left)
    assert_spread(found, numels, sum(fixed.values()) + left)
    assert {name: found[name] for name in given} == fixed
    assert {name: found[name] for name in others} == uniform_removals(others, left)


def test_given_globs():
    numels = {"a.q": 100, "a.k": 100, "b.q": 200}
    assert given_removals(numels, {"*.q": 0.1}, 100) == {"a.q": 10, "a.k": 70, "b.q": 20}
    assert given_removals(numels, {"*.q": 0.5, "*.k": 0.0}, 150) == {"a.q": 50, "a.k": 0, "b.q": 100}


@pytest.mark.parametrize(
    ("given", "removed", "message"),
    [
        ({"*.v": 0.5}, 200, r"'\*\.v' matches none of the tensors; names look like 'a\.q'"),
        ({"*.q": 0.5, "a.*": 0.1}, 200, r"'\*\.q' and 'a\.\*' both match a\.q; one sparsity a tensor"),
        ({"*": 0.5}, 100, r"names every tensor, and removes 200 weights in all, not 100\. Pass sparsity=0\.5"),
        ({"*.q": 0.9}, 200, r"removes 270 weights .* so -70 of the 100 in the other tensors"),
        ({"*.q": 0.1}, 300, r"so 270 of the 100 in the other tensors would have to go for 300"),
        ({"*.q": 1.0}, 200, r"allocation\['\*\.q'\] is the fraction removed"),
    ],
)
def test_given_sparsities_that_cannot_be(given, removed, message):
    with pytest.raises(SparsityError, match=message):
        given_removals({"a.q": 100, "a.k": 100, "b.q": 200}, given, removed)


@pytest.mark.parametrize(
    "rule",
    [
        lambda removed: uniform_removals({"a": 3, "b": 0, "c": 1}, removed),
        lambda removed: erk_removals({"a": (3,), "b": (0, 2), "c": ()}, removed),
        lambda removed: outlier_removals({"a": 3, "b": 0, "c": 1}, named_shares(), removed, 0.1),
        lambda removed: lamp_removals({"a": torch.ones(3), "b": torch.ones(0), "c": torch.ones(1)}, [removed])[0],
    ],
    ids=["uniform", "erk", "owl", "lamp"],
)
def test_every_tensor_keeps_a_weight(rule):
    assert rule(2) == {"a": 2, "b": 0, "c": 0}
    with pytest.raises(
        SparsityError, match=r"Cannot remove 3 of 4 weights: every tensor keeps at least 1.* most 2"
    ):
        rule(3)


def named_shares():
    return {"a": Fraction(1, 3), "b": Fraction(0), "c": Fraction(0)}


@settings(max_examples=100)
@given(shape_lists, st.floats(0, 1), st.floats(0, 1), st.sampled_from(["uniform", "erk", "owl"]))
def test_shares_fall_with_density_up_to_the_rounding(shapes, one, other, rule):
    shapes = named(shapes)
    numels = numels_of(shapes)
    shares = {name: Fraction(index % 3, 10) for index, name in enumerate(numels)}
    low, high = (
        {
            "uniform": lambda removed: uniform_removals(numels, removed),
            "erk": lambda removed: erk_removals(shapes, removed),
            "owl": lambda removed: outlier_removals(numels, shares, removed, 0.08),
        }[rule](round(share * most_of(numels)))
        for share in sorted((one, other))
    )
    assert all(high[name] >= low[name] - 1 for name in numels)


# --- OWL ---


@settings(max_examples=100)
@given(
    st.lists(st.tuples(st.integers(50, 1000), st.integers(0, 20)), min_size=1, max_size=8),
    st.floats(0.2, 0.8),
    st.sampled_from((0.01, 0.08, 0.1)),
)
def test_owl_lies_in_its_band_and_in_line(layers, sparsity, band):
    numels = named(numel for numel, _ in layers)
    shares = named(Fraction(outliers, 1000) for _, outliers in layers)
    total = sum(numels.values())
    removed = round(sparsity * total)
    found = outlier_removals(numels, shares, removed, band)
    assert_spread(found, numels, removed)
    for name, numel in numels.items():
        assert abs(found[name] / numel - removed / total) <= band + 1 / numel
    for one in numels:
        for other in numels:
            if shares[one] > shares[other]:  # more outliers, less removed
                assert found[one] / numels[one] <= found[other] / numels[other] + 2 / 50
    mean = sum(shares[name] * numel for name, numel in numels.items()) / total
    farthest = max(abs(share - mean) for share in shares.values())
    factor = Fraction(str(band)) / farthest if farthest else 0
    exact = {
        name: (Fraction(removed, total) - factor * (shares[name] - mean)) * numel for name, numel in numels.items()
    }
    assert found == oracles.by_largest_remainder(exact, removed)


def test_owl_is_the_authors_line_where_the_mean_is_in_the_middle():
    """The authors stretch the shares to a width of 2 lambda around their mean: 0.5 +- 0.08 for two blocks."""
    numels = {"layers.0.weight": 1000, "layers.1.weight": 1000}
    shares = {"layers.0.weight": Fraction(5, 100), "layers.1.weight": Fraction(1, 100)}
    assert outlier_removals(numels, shares, 1000, 0.08) == {"layers.0.weight": 420, "layers.1.weight": 580}


def test_outliers_are_counted_over_a_block():
    torch.manual_seed(0)
    tensors = {
        "model.layers.0.q.weight": torch.randn(30, 40),
        "model.layers.0.k.weight": 3 * torch.randn(10, 7).t().bfloat16(),
        "model.layers.1.q.weight": torch.randn(20, 20) ** 3,
        "head.weight": torch.randn(0, 3),
    }
    blocks = {"0": list(tensors)[:2], "1": list(tensors)[2:3]}
    for threshold in (1.0, 2.5, 5):
        found = outlier_shares(tensors, threshold)
        for names in blocks.values():
            values = [abs(value) for name in names for value in oracles.flat(tensors[name])]
            assert {found[name] for name in names} == {oracles.outlier_share(values, threshold)}
        assert found["head.weight"] == 0


# --- LAMP ---


@settings(max_examples=150)
@given(weights(), st.lists(st.floats(0, 1), min_size=1, max_size=4))
def test_lamp_equals_scoring_every_weight(tensors, shares):
    tensors = {name: torch.where(tensor.isfinite(), tensor, 0) for name, tensor in tensors.items()}
    numels = {name: tensor.numel() for name, tensor in tensors.items()}
    removals = [round(share * most_of(numels)) for share in shares]
    found = lamp_removals(tensors, removals)
    assert found == [oracles.lamp_removals(tensors, removed) for removed in removals]
    for one, removed in zip(found, removals, strict=True):
        assert_spread(one, numels, removed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_lamp_of_larger_layers(dtype):
    """Cells of many weights: the score at the cut has to be searched for."""
    torch.manual_seed(0)
    tensors = named(
        (torch.randn(numel) * scale).to(dtype) for numel, scale in [(9000, 1), (5000, 50), (700, 0.01)]
    )
    removals = [1, 500, 7000, 12000, 14696, 14697]
    assert lamp_removals(tensors, removals) == [oracles.lamp_removals(tensors, removed) for removed in removals]


def test_lamp_knows_no_scale():
    """A layer times a power of two scores the same, even where its squares would leave the range of float64."""
    torch.manual_seed(0)
    one, other = torch.randn(200, dtype=torch.float64), torch.randn(100, dtype=torch.float64)
    (plain,) = lamp_removals({"a": one, "b": other}, [150])
    (scaled,) = lamp_removals({"a": one * 2.0**1000, "b": other * 2.0**-1000}, [150])
    assert scaled == plain


def test_lamp_takes_zeros_first():
    zeros = np.zeros(50)
    tensors = {"a": torch.from_numpy(np.append(zeros, 1.0)), "b": torch.from_numpy(np.append(zeros, [2.0, 3.0]))}
    assert lamp_removals(tensors, [30, 70, 100]) == [{"a": 30, "b": 0}, {"a": 50, "b": 20}, {"a": 50, "b": 50}]
