"""Overlap against sets, chance against scipy's hypergeometric distribution and against random masks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from lottery_tickets import Mask, compute_ticket_overlap, create_magnitude_mask
from lottery_tickets.errors import EvaluationError, MaskError, MaskMismatchError
from lottery_tickets.overlap import _Counts, _similarity

METHODS = ("jaccard", "dice", "overlap")
Layers = dict[str, torch.Tensor]


@st.composite
def pairs_of_masks(draw: st.DrawFn) -> tuple[Layers, Layers]:
    """Two masks over the same layers, of any densities, empty and full ones included."""
    first, second = {}, {}
    for name in draw(st.lists(st.sampled_from("abcd"), min_size=1, unique=True)):
        size = draw(st.integers(0, 20))
        bits = st.lists(st.booleans(), min_size=size, max_size=size)
        choice = st.one_of(bits, st.just([True] * size), st.just([False] * size))
        first[name], second[name] = (torch.tensor(draw(choice), dtype=torch.bool) for _ in range(2))
    return first, second


def kept(layers: Mapping[str, torch.Tensor]) -> set[tuple[str, int]]:
    return {(name, index) for name, bits in layers.items() for index, bit in enumerate(bits.tolist()) if bit}


def by_sets(method: str, first: set[Any], second: set[Any]) -> float:
    if not first and not second:
        return 1.0
    if not first or not second:
        return 0.0
    common = len(first & second)
    size = {"jaccard": len(first | second), "overlap": min(len(first), len(second))}
    return common / size[method] if method in size else 2 * common / (len(first) + len(second))


@given(pairs_of_masks(), st.sampled_from(METHODS))
def test_overlap_is_that_of_the_sets(pair: tuple[Layers, Layers], method: Any) -> None:
    a, b = pair
    found = compute_ticket_overlap(a, Mask.from_tensors(b), method)
    assert found["method"] == method
    assert found["overall_overlap"] == by_sets(method, kept(a), kept(b))
    expected = {name: by_sets(method, kept({name: a[name]}), kept({name: b[name]})) for name in a}
    assert found["layer_overlaps"] == expected
    numel = sum(bits.numel() for bits in a.values())
    assert found["summary"] == {
        "total_intersection": len(kept(a) & kept(b)),
        "total_union": len(kept(a) | kept(b)),
        "total_params_mask1": len(kept(a)),
        "total_params_mask2": len(kept(b)),
        "sparsity_mask1": (numel - len(kept(a))) / numel if numel else 0.0,
        "sparsity_mask2": (numel - len(kept(b))) / numel if numel else 0.0,
        "layers_processed": len(a),
        "layers_skipped": 0,
        "layers_mask1": len(a),
        "layers_mask2": len(a),
    }
    assert found["warnings"] == found["skipped_layers"] == []
    json.dumps(found)


@given(pairs_of_masks(), st.sampled_from(METHODS))
def test_the_masks_may_change_places(pair: tuple[Layers, Layers], method: Any) -> None:
    a, b = pair
    one, other = compute_ticket_overlap(a, b, method), compute_ticket_overlap(b, a, method)
    for key in ("overall_overlap", "layer_overlaps", "expected_by_chance", "excess", "z_score"):
        assert one[key] == other[key]
    assert compute_ticket_overlap(a, a, method)["overall_overlap"] == 1.0


@pytest.mark.filterwarnings("ignore:.*encountered in divide:RuntimeWarning")  # scipy's kurtosis of tiny layers
@given(pairs_of_masks(), st.sampled_from(METHODS))
def test_chance_is_hypergeometric(pair: tuple[Layers, Layers], method: Any) -> None:
    a, b = pair
    found = compute_ticket_overlap(a, b, method)
    layers = [(bits.numel(), int(bits.sum()), int(b[name].sum())) for name, bits in a.items()]
    mean = sum(stats.hypergeom.mean(n, k1, k2) for n, k1, k2 in layers if n)
    variance = sum(stats.hypergeom.var(n, k1, k2) for n, k1, k2 in layers if n > 1)
    k1, k2 = (sum(layer[index] for layer in layers) for index in (1, 2))
    if k1 and k2:
        expected = {
            "jaccard": mean / (k1 + k2 - mean),
            "dice": 2 * mean / (k1 + k2),
            "overlap": mean / min(k1, k2),
        }
        assert found["expected_by_chance"] == pytest.approx(expected[method])
    assert found["excess"] == found["overall_overlap"] - found["expected_by_chance"]
    if variance < 1e-12:
        assert found["z_score"] is None
    else:
        z = (found["summary"]["total_intersection"] - mean) / variance**0.5
        assert found["z_score"] == pytest.approx(z, abs=1e-9)


def test_random_masks_show_no_excess() -> None:
    torch.manual_seed(0)
    layers = {"a": torch.rand(40, 30) > 0.2, "b": torch.rand(900) > 0.7, "c": torch.rand(7) > 0.5}
    mask = Mask.from_tensors(layers)
    found = [
        compute_ticket_overlap(Mask.random_like(mask, seed), Mask.random_like(mask, 1000 + seed))
        for seed in range(300)
    ]
    scores = np.array([one["z_score"] for one in found])
    assert abs(scores.mean()) < 4 / 300**0.5
    assert 0.85 < scores.std() < 1.15
    overlaps = np.array([one["overall_overlap"] for one in found])
    assert found[0]["expected_by_chance"] > 0.5  # high overlap, and none of it agreement
    error = overlaps.std() / 300**0.5
    assert overlaps.mean() == pytest.approx(found[0]["expected_by_chance"], abs=4 * error)


def test_agreement_shows_beside_chance(load_smollm2: Any) -> None:
    model = load_smollm2(torch.bfloat16)
    low, high = create_magnitude_mask(model, [0.1, 0.9])
    for mask, bound in ((low, 0.8), (high, 0.1)):
        chance = compute_ticket_overlap(mask, Mask.random_like(mask, 0))
        assert abs(chance["z_score"]) < 5
        assert chance["overall_overlap"] > bound / 2
        assert abs(chance["excess"]) < 1e-3
    nested = compute_ticket_overlap(low, high, "overlap")
    assert nested["overall_overlap"] == 1.0
    assert nested["z_score"] > 1000


def test_counts_are_exact_beyond_floats() -> None:
    n, a, b = 2**62 + 1, 2**61 + 1, 2**61 + 3
    counts = _Counts(n, a, b, common=a * b // n + 1)
    assert counts.deviation == float(counts.common - Fraction(a * b, n))
    assert counts.variance == float(Fraction(a * b * (n - a) * (n - b), n * n * (n - 1)))
    assert _similarity("jaccard", 2**62, 2**63 - 1, 2**62) == float(Fraction(2**62, 2**63 - 1))


# ---------------------------------------------------------------- layers that do not match


A = {"shared": torch.tensor([True, True, False]), "mine": torch.ones(4), "bent": torch.ones(2, 3)}
B = {"shared": torch.tensor([True, False, False]), "yours": torch.ones(5), "bent": torch.ones(3, 2)}


def test_unmatched_layers_are_skipped_and_named() -> None:
    found = compute_ticket_overlap(A, B)
    assert found["overall_overlap"] == 0.5
    assert found["layer_overlaps"] == {"shared": 0.5}
    assert found["skipped_layers"] == ["bent", "mine", "yours"]
    assert found["warnings"] == [
        "bent: shapes differ, (2, 3) in mask1 and (3, 2) in mask2.",
        "mine: only in mask1.",
        "yours: only in mask2.",
    ]
    summary = found["summary"]
    assert (summary["layers_processed"], summary["layers_skipped"]) == (1, 3)
    assert (summary["layers_mask1"], summary["layers_mask2"]) == (3, 3)
    assert (summary["total_params_mask1"], summary["total_params_mask2"]) == (2, 1)


def test_strict_refuses_unmatched_layers() -> None:
    with pytest.raises(MaskMismatchError, match=r"cannot be compared whole: bent: shapes differ.*yours: only in"):
        compute_ticket_overlap(A, B, strict=True)
    assert compute_ticket_overlap(A, A, strict=True)["overall_overlap"] == 1.0


@pytest.mark.parametrize("strict", [True, False])
def test_nothing_in_common_is_not_agreement(strict: bool) -> None:
    with pytest.raises(MaskMismatchError, match=r"no layer in common: a: only in mask1\. b: only in mask2\."):
        compute_ticket_overlap({"a": torch.ones(2)}, {"b": torch.ones(2)}, strict=strict)
    assert compute_ticket_overlap({}, {})["overall_overlap"] == 1.0


@pytest.mark.parametrize("method", METHODS)
def test_empty_masks(method: Any) -> None:
    none, some = {"w": torch.zeros(3)}, {"w": torch.ones(3)}
    both = compute_ticket_overlap(none, none, method)
    assert (both["overall_overlap"], both["layer_overlaps"], both["excess"]) == (1.0, {"w": 1.0}, 0.0)
    one = compute_ticket_overlap(none, some, method)
    assert (one["overall_overlap"], one["layer_overlaps"], one["z_score"]) == (0.0, {"w": 0.0}, None)


def test_other_refusals() -> None:
    with pytest.raises(EvaluationError, match="method is 'jaccard', 'dice' or 'overlap', got 'cosine'"):
        compute_ticket_overlap(A, A, "cosine")  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="Expected a Mask or a dict of tensors by parameter name, got Linear"):
        compute_ticket_overlap(nn.Linear(2, 2), A)  # type: ignore[arg-type]
