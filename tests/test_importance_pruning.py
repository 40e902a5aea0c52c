"""Masks from scores: the same bits as the slow way, exact totals, rules that mean something, and a real model."""

from __future__ import annotations

import itertools
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import oracles
from lottery_tickets import (
    LayerCollapseWarning,
    Mask,
    create_importance_mask,
    create_magnitude_mask,
    prunable_parameters,
)
from lottery_tickets.errors import MaskMismatchError, ParameterSelectionError, SparsityError, WeightsError
from lottery_tickets.sparsity import _rows, uniform_removals
from processes import PEAK, run_python
from strategies import sparsities, tensors, weights

ALLOCATIONS = ("uniform", "erk", "lamp", "owl", {"*0.weight": 0.25})


@pytest.fixture(autouse=True)
def _collapse_is_no_news():
    """Small random tensors are emptied all the time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        yield


@st.composite
def signed_scores(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Scores of several 16- and 32-bit types, full of ties, zeros of both signs and infinities."""
    kinds = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))
    drawn = draw(st.lists(kinds.flatmap(tensors), min_size=1, max_size=4))
    return {f"layer{index}.weight": tensor for index, tensor in enumerate(drawn)}


def numel_of(scores):
    return sum(score.numel() for score in scores.values())


def as_bytes(mask):
    if isinstance(mask, Mask):
        return {name: mask.packed(name).tobytes() for name in mask}
    return {name: oracles.packed(decisions) for name, decisions in mask.items()}


def by_value(scores, removed, *, downwards=False):
    """The slow mask: sort all scores by value."""
    sign = -1 if downwards else 1
    ranking = sorted(
        (sign * value, turn, name, position)
        for turn, (name, score) in enumerate(scores.items())
        for position, value in enumerate(oracles.flat(score))
    )
    return oracles.mask_without(scores, ranking[:removed])


def finite(scores):
    assume(all(bool(score.isfinite().all()) for score in scores.values()))
    return scores


# --- By value, downwards, by scope ---


@settings(max_examples=100)
@given(signed_scores(), sparsities())
def test_scores_rank_by_value(scores, sparsity):
    removed = round(sparsity * numel_of(scores))
    assert as_bytes(create_importance_mask(scores, sparsity)) == as_bytes(by_value(scores, removed))
    downwards = create_importance_mask(scores, sparsity, keep="smallest")
    assert as_bytes(downwards) == as_bytes(by_value(scores, removed, downwards=True))


@settings(max_examples=40)
@given(signed_scores(), sparsities())
def test_layer_scope_is_each_tensor_by_itself(scores, sparsity):
    expected = {}
    for name, score in scores.items():
        expected |= by_value({name: score}, round(sparsity * score.numel()))
    assert as_bytes(create_importance_mask(scores, sparsity, scope="layer")) == as_bytes(expected)


@settings(max_examples=40)
@given(weights(), sparsities(), st.sampled_from(("global", "layer")))
def test_sizes_rank_as_magnitudes_do(scores, sparsity, scope):
    assume(scores)
    sizes = {name: score.abs() for name, score in scores.items()}
    assert create_importance_mask(sizes, sparsity, scope=scope) == create_magnitude_mask(
        scores, sparsity, scope=scope
    )


def test_floors_keep_the_total_exact():
    scores = {"a": -torch.arange(100.0), "b": torch.arange(100.0)}
    mask = create_importance_mask(scores, 0.5, min_density=0.1)
    assert mask.layer_kept() == {"a": 10, "b": 90}


# --- Rows ---


@settings(max_examples=100)
@given(signed_scores(), sparsities(), st.booleans())
def test_rows(scores, sparsity, signed):
    numels = {name: score.numel() for name, score in scores.items()}
    removed = round(sparsity * sum(numels.values()))
    assume(removed <= sum(max(numel - 1, 0) for numel in numels.values()))
    removals = uniform_removals(numels, removed)
    expected = {}
    for name, score in scores.items():
        values = score if signed else score.abs()
        rows = (values if values.dim() > 1 else values.reshape(1, -1)).flatten(1).tolist()
        kept = oracles.kept_by_row(rows, removals[name]) if score.numel() else []
        expected[name] = torch.tensor(kept, dtype=torch.bool).reshape(score.shape)
    found = (
        create_importance_mask(scores, sparsity, scope="row")
        if signed
        else create_magnitude_mask(scores, sparsity, scope="row")
    )
    assert as_bytes(found) == as_bytes(expected)
    assert found.numel - found.kept == removed


@pytest.mark.parametrize(
    ("layer", "by_output"),
    [
        (nn.Conv2d(6, 4, 3), lambda weight: weight.flatten(1)),
        (nn.ConvTranspose2d(6, 4, 3), lambda weight: weight.transpose(0, 1).flatten(1)),
        (
            nn.ConvTranspose1d(6, 4, 3, groups=2),
            lambda weight: torch.cat([part.transpose(0, 1).flatten(1) for part in weight.chunk(2)]),
        ),
    ],
    ids=["convolution", "transposed", "transposed in groups"],
)
def test_rows_are_outputs(layer, by_output):
    mask = create_magnitude_mask(layer, 0.31, scope="row")["weight"]
    rows = by_output(layer.weight.detach().abs())
    removed = round(0.31 * layer.weight.numel())
    assert by_output(mask).tolist() == oracles.kept_by_row(rows.tolist(), removed)


def test_rows_of_transformers_conv1d_are_columns():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
    mask = create_magnitude_mask(conv1d, 0.3, scope="row")["weight"]
    expected = oracles.kept_by_row(conv1d.weight.abs().t().tolist(), round(0.3 * 48))
    assert mask.t().tolist() == expected


def test_blocks_of_rows_join_without_a_seam(monkeypatch):
    torch.manual_seed(0)
    scores = {"a": torch.randint(-4, 5, (61, 7)).float(), "b": torch.randn(3, 1000), "c": torch.randn(50, 2, 3)}
    whole = create_importance_mask(scores, [0.1, 0.5, 0.9], scope="row")
    monkeypatch.setattr(_rows, "block_size", lambda dtype, buffers: 64)
    assert create_importance_mask(scores, [0.1, 0.5, 0.9], scope="row") == whole


@settings(max_examples=40)
@given(tensors(torch.float32), sparsities(), sparsities())
def test_rows_of_a_tensor_are_nested(score, one, other):
    assume(score.numel())
    low, high = sorted(min(sparsity, (score.numel() - 1) / score.numel()) for sparsity in (one, other))
    masks = create_importance_mask({"w": score}, [low, high], scope="row")
    assert bool((masks[0]["w"] | ~masks[1]["w"]).all())


# --- Allocations ---


@settings(max_examples=100)
@given(weights(), st.floats(0, 0.99), st.sampled_from(ALLOCATIONS), st.sampled_from(("global", "row")))
def test_allocated_totals_are_exact_and_each_layer_keeps_its_largest(scores, sparsity, allocation, scope):
    assume(scores and not (allocation == "lamp" and scope == "row"))
    if allocation in ("lamp", "owl"):
        finite(scores)
    sizes = {name: score.abs() for name, score in scores.items()}
    removed = round(sparsity * numel_of(scores))
    try:
        mask = create_importance_mask(sizes, sparsity, allocation=allocation, scope=scope)
    except SparsityError:
        # Tiny tensors cannot give what is asked and keep a weight each, or the named one is the only one.
        spare = sum(max(score.numel() - 1, 0) for score in scores.values())
        assert removed > spare or isinstance(allocation, dict)
        return
    assert mask.numel - mask.kept == removed
    assert all(0 <= share < 1 for name, share in mask.layer_sparsity().items() if scores[name].numel())
    assert create_magnitude_mask(scores, sparsity, allocation=allocation, scope=scope) == mask
    removals = {name: scores[name].numel() - kept for name, kept in mask.layer_kept().items()}
    if scope == "global":
        assert as_bytes(mask) == as_bytes(oracles.kept_by_number(sizes, removals))


@settings(max_examples=60)
@given(
    weights(),
    st.floats(0, 0.9),
    st.floats(0, 0.9),
    st.sampled_from((None, "global", "uniform", "erk", "lamp", "owl")),
)
def test_nested_where_no_rounding_goes_back(scores, one, other, allocation):
    assume(scores)
    if allocation in ("lamp", "owl"):
        finite(scores)
    asked = sorted((one, other))
    assume(round(asked[1] * numel_of(scores)) <= sum(max(score.numel() - 1, 0) for score in scores.values()))
    low, high = create_magnitude_mask(scores, asked, allocation=allocation)
    for name, kept in low.layer_kept().items():
        if high.layer_kept()[name] <= kept:
            assert bool((low[name] | ~high[name]).all())
        else:
            assert allocation in ("uniform", "erk", "owl")
            assert high.layer_kept()[name] == kept + 1


def test_lamp_is_one_threshold_for_lamp_scores():
    torch.manual_seed(0)
    scores = {"a": torch.rand(40, 30), "b": 10 * torch.rand(20, 15), "c": torch.rand(50) ** 4}
    mask = create_importance_mask(scores, 0.7, allocation="lamp")
    lamp = {}
    for name, score in scores.items():
        order = score.flatten().double().argsort(stable=True)
        squares = score.flatten().double()[order].square()
        suffix = torch.tensor(list(itertools.accumulate(squares.flip(0).tolist()))).double().flip(0)
        lamp[name] = torch.empty_like(squares).scatter_(0, order, squares / suffix).reshape(score.shape)
    assert create_importance_mask(lamp, 0.7) == mask


def test_allocations_of_a_language_model(load_smollm2):
    """Real shapes: all totals exact, ERK keeps the small projections, OWL stays in its band."""
    model = load_smollm2(torch.bfloat16)
    shapes = {name: weight.shape for name, weight in prunable_parameters(model).items()}
    numel = sum(shape.numel() for shape in shapes.values())
    masks = {
        **{
            allocation: create_magnitude_mask(model, 0.6, allocation=allocation) for allocation in ALLOCATIONS[1:4]
        },
        "mlp": create_magnitude_mask(model, 0.6, allocation={"*.mlp.*": 0.7}),
        "row": create_magnitude_mask(model, 0.6, scope="row"),
        "2:4": create_magnitude_mask(model, None, pattern="2:4"),
    }
    for name, mask in masks.items():
        assert mask.numel - mask.kept == (numel // 2 if name == "2:4" else round(0.6 * numel)), name
        assert all(0 <= share < 1 for share in mask.layer_sparsity().values()), name
    densities = oracles.erk_densities(shapes, 1 - Fraction(round(0.6 * numel), numel))
    exact = {name: (1 - densities[name]) * shape.numel() for name, shape in shapes.items()}
    assert {
        name: shapes[name].numel() - kept for name, kept in masks["erk"].layer_kept().items()
    } == oracles.by_largest_remainder(exact, round(0.6 * numel))
    assert all(0.52 - 1e-3 <= share <= 0.68 + 1e-3 for share in masks["owl"].layer_sparsity().values())
    last = model.model.layers[-1].mlp.down_proj.weight.detach()[:64].float()
    row_kept = masks["row"]["model.layers.29.mlp.down_proj.weight"][:64]
    pairs_kept = masks["2:4"]["model.layers.29.mlp.down_proj.weight"][:64]
    assert row_kept.tolist() == [
        oracles.kept_of_row(row, len(row) - int(kept.sum()))
        for row, kept in zip(last.abs().tolist(), row_kept, strict=True)
    ]
    assert int(row_kept.sum(dim=1).max() - row_kept.sum(dim=1).min()) <= 1
    assert torch.equal(pairs_kept, oracles.kept_by_pattern(last.abs(), 2, 4))


# --- With a model ---


def test_the_model_tells_which_scores_there_must_be():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    scores = {"1.weight": torch.rand(2, 3), "0.weight": torch.rand(3, 4)}
    assert list(create_importance_mask(scores, 0.5, model=model)) == ["0.weight", "1.weight"]
    assert list(create_importance_mask(scores, 0.5, model=model, exclude="1.*")) == ["0.weight"]
    with pytest.raises(MaskMismatchError, match=r"No scores for 0\.weight of Sequential"):
        create_importance_mask({"1.weight": scores["1.weight"]}, 0.5, model=model)
    with pytest.raises(MaskMismatchError, match=r"2\.weight: the model has no such parameter"):
        create_importance_mask(scores | {"2.weight": torch.rand(2)}, 0.5, model=model)
    with pytest.raises(MaskMismatchError, match=r"1\.weight: scores \(3, 2\), parameter \(2, 3\)"):
        create_importance_mask(scores | {"1.weight": torch.rand(3, 2)}, 0.5, model=model)


def test_tied_weights_are_scored_under_their_canonical_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    scores = {"0.weight": torch.rand(3, 3)}
    assert list(create_importance_mask(scores, 0.5, model=model)) == ["0.weight"]
    with pytest.raises(MaskMismatchError, match=r"1\.weight: tied to 0\.weight, which is the name to use"):
        create_importance_mask(scores | {"1.weight": torch.rand(3, 3)}, 0.5, model=model)


def test_names_are_chosen_among_a_models():
    with pytest.raises(ParameterSelectionError, match="pass model=, or fewer scores"):
        create_importance_mask({"w": torch.ones(3)}, 0.5, exclude="w")


# --- What means nothing ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "2:4", "allocation": "erk"}, "pattern='2:4' and allocation='erk' contradict"),
        ({"pattern": "2:4", "scope": "row"}, "pattern='2:4' and scope='row' contradict"),
        ({"pattern": "2:4", "scope": "layer"}, "pattern='2:4' and scope='layer' contradict"),
        ({"pattern": "2:4", "min_density": 0.1}, "pattern='2:4' and min_density=0.1 contradict"),
        ({"allocation": "erk", "scope": "layer"}, "allocation='erk' and scope='layer' contradict"),
        ({"allocation": {"w": 0.5}, "scope": "layer"}, "and scope='layer' contradict"),
        ({"allocation": "lamp", "scope": "row"}, "allocation='lamp' and scope='row' contradict"),
        ({"allocation": "global", "scope": "row"}, "allocation='global' and scope='row' contradict"),
        ({"allocation": "owl", "min_density": 0.1}, "min_density=0.1 and allocation='owl' contradict"),
        ({"scope": "row", "min_density": 0.1}, "min_density=0.1 and scope='row' contradict"),
        ({"allocation": "er"}, "allocation is 'global', .* or a dict {glob: sparsity}, got 'er'"),
        ({"scope": "column"}, "scope is 'global', 'layer' or 'row', got 'column'"),
        (
            {"pattern": "2:4", "pattern_remainder": "pad"},
            "pattern_remainder is 'error' or 'dense', got 'pad'",
        ),
        ({"allocation": "owl", "owl_threshold": 0}, "owl_threshold is a positive number; got 0"),
        ({"allocation": "owl", "owl_lambda": float("nan")}, "owl_lambda is a positive number; got nan"),
    ],
)
@pytest.mark.parametrize("create", [create_importance_mask, create_magnitude_mask])
def test_rules_that_contradict_each_other(create, options, message):
    with pytest.raises(SparsityError, match=message):
        create({"w": torch.rand(4, 4)}, 0.5, **options)


@pytest.mark.parametrize("allocation", ["lamp", "owl"])
def test_sums_need_sizes(allocation):
    scores = {"w": torch.rand(4, 4), "v": torch.tensor([1.0, -1.0])}
    with pytest.raises(SparsityError, match=rf"allocation='{allocation}' .* negative scores \(v\)"):
        create_importance_mask(scores, 0.5, allocation=allocation)
    with pytest.raises(SparsityError, match=rf"allocation='{allocation}' .* keep='smallest'"):
        create_importance_mask({"w": torch.rand(4, 4)}, 0.5, allocation=allocation, keep="smallest")
    with pytest.raises(WeightsError, match=r"there is inf in v"):
        create_importance_mask({"w": torch.rand(4, 4), "v": torch.tensor([np.inf])}, 0.5, allocation=allocation)
    with pytest.raises(SparsityError, match="and nan='prune' contradict"):
        create_magnitude_mask(scores, 0.5, allocation=allocation, nan="prune")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({}, "scores is empty"),
        ({"w": torch.ones(3), "v": torch.tensor([1.0, np.nan, np.nan])}, r"found in v \(2\)"),
        ({"w": torch.arange(3)}, "w: weights are ranked by magnitude in bfloat16"),
        ({"w": [1.0, 2.0]}, "w: expected a tensor of weights, got list"),
        ({"w": torch.ones(3, device="meta")}, "w is on the meta device"),
        ({"w": torch.tensor([-1.0, 1.0], dtype=torch.float64)}, "float64 in w"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"pattern": "1:2", "pattern_remainder": "dense"}])
def test_scores_without_a_rank(scores, message, options):
    with pytest.raises(WeightsError, match=message):
        create_importance_mask(scores, 0.5, **options)


def test_keep_is_one_of_two():
    with pytest.raises(SparsityError, match="keep is 'largest' or 'smallest'"):
        create_importance_mask({"w": torch.ones(3)}, 0.5, keep="best")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan"), "0.5", None, True])
def test_sparsities_outside_are_refused(sparsity):
    with pytest.raises(SparsityError, match="sparsity is the fraction removed"):
        create_importance_mask({"w": torch.ones(3)}, sparsity)


def test_an_emptied_tensor_is_named():
    with pytest.warns(LayerCollapseWarning, match=r"sparsity 0\.5: a"):
        create_importance_mask({"a": torch.zeros(4), "b": torch.ones(4)}, 0.5)


# --- Memory ---


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "most"),
    [("scope='row'", 64), ("pattern='2:4'", 64), ("allocation='owl'", 64), ("allocation='lamp'", 64)],
)
def test_peak_memory_does_not_grow_with_the_model(options, most):
    """8 tensors of 8M weights: the masks and a constant."""
    script = f"""
import torch
from lottery_tickets import create_importance_mask
scores = {{f"{{i}}.weight": torch.rand(2048, 4096) for i in range(8)}}
small = {{name: score[:64] for name, score in scores.items()}}
create_importance_mask(small, 0.5, progress=False, {options})
{PEAK}
before = peak()
mask = create_importance_mask(scores, 0.5, progress=False, {options})
print((peak() - before) / 2**20 - mask.numel / 8 / 2**20)
"""
    assert float(run_python(script)) <= most
