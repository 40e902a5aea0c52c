"""Magnitude masks: exact counts, the same bits by every route, on tensors, models and a language model."""

from __future__ import annotations

import itertools
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import oracles
from lottery_tickets import (
    LayerCollapseWarning,
    Mask,
    compute_layerwise_magnitude_ticket,
    create_magnitude_mask,
    prunable_parameters,
)
from lottery_tickets.errors import ParameterSelectionError, SparsityError, WeightsError
from processes import PEAK, run_python
from strategies import DTYPES, sparsities, weights

NINE = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.fixture(autouse=True)
def _collapse_is_no_news():
    """Small random tensors are emptied all the time; the warning has tests of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerCollapseWarning)
        yield


def as_bytes(mask: Mask | dict[str, torch.Tensor]) -> dict[str, bytes]:
    if isinstance(mask, Mask):
        return {name: mask.packed(name).tobytes() for name in mask}
    return {name: oracles.packed(decisions) for name, decisions in mask.items()}


def numel_of(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


# --- The same bits by every route ---


@settings(max_examples=100)
@given(weights(), sparsities())
def test_histogram_sort_and_oracle_are_equal(tensors, sparsity):
    expected = oracles.magnitude_mask(tensors, round(sparsity * numel_of(tensors)))
    for use_histogram in (True, False):
        mask = create_magnitude_mask(tensors, sparsity, use_histogram)
        assert as_bytes(mask) == as_bytes(expected)
        assert mask.shapes == {name: tensor.shape for name, tensor in tensors.items()}
        assert mask.numel - mask.kept == round(sparsity * mask.numel)


@settings(max_examples=40)
@given(weights(nan=True), sparsities())
def test_nan_goes_first(tensors, sparsity):
    expected = oracles.magnitude_mask(tensors, round(sparsity * numel_of(tensors)))
    for use_histogram in (True, False):
        assert as_bytes(create_magnitude_mask(tensors, sparsity, use_histogram, nan="prune")) == as_bytes(expected)


@settings(max_examples=40)
@given(weights(), sparsities())
def test_layer_scope_is_each_tensor_by_itself(tensors, sparsity):
    expected = {}
    for name, tensor in tensors.items():
        expected |= oracles.magnitude_mask({name: tensor}, round(sparsity * tensor.numel()))
    for use_histogram in (True, False):
        assert as_bytes(create_magnitude_mask(tensors, sparsity, use_histogram, scope="layer")) == as_bytes(
            expected
        )


@settings(max_examples=40)
@given(
    weights(),
    st.lists(sparsities(), min_size=1, max_size=6),
    st.sampled_from(("global", "layer")),
    st.sampled_from((None, 0.0, 0.05)),
)
def test_lists_equal_single_masks_and_are_nested(tensors, asked, scope, min_density):
    try:
        masks = create_magnitude_mask(tensors, asked, scope=scope, min_density=min_density)
    except SparsityError:
        assert min_density
        return
    alone = [create_magnitude_mask(tensors, one, scope=scope, min_density=min_density) for one in asked]
    assert masks == alone
    ordered = [mask for _, mask in sorted(zip(asked, masks, strict=True), key=lambda pair: pair[0])]
    for denser, sparser in itertools.pairwise(ordered):
        assert sparser & denser == sparser


@settings(max_examples=60)
@given(weights(), sparsities(), st.sampled_from((0.0, 0.01, 0.1, 0.5, 0.9)))
def test_floors_keep_the_total_exact(tensors, sparsity, min_density):
    removed = round(sparsity * numel_of(tensors))
    expected = oracles.floored_mask(tensors, removed, min_density)
    for use_histogram in (True, False):
        if expected is None:
            with pytest.raises(SparsityError, match=f"Cannot remove {removed} weights: min_density={min_density}"):
                create_magnitude_mask(tensors, sparsity, use_histogram, min_density=min_density)
        else:
            found = create_magnitude_mask(tensors, sparsity, use_histogram, min_density=min_density)
            assert as_bytes(found) == as_bytes(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("amount", [0.1, 0.29, 0.5, 0.9])
def test_without_ties_it_is_torchs_global_unstructured(dtype, amount):
    """Distinct magnitudes of random signs, shuffled over three layers."""
    count = 120 + 252 + 40
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
    # 412 neighbours of 1.0 upward: distinct in every type.
    step = {torch.bfloat16: 2**7, torch.float16: 2**10}.get(dtype, 2**20)
    patterns = torch.arange(1, count + 1).double()
    values = (torch.exp2(torch.floor(patterns / step)) * (1 + patterns % step / step)).to(dtype) * signs
    assert values.abs().unique().numel() == count
    values = values[torch.randperm(count, generator=generator)]
    model = nn.Sequential(nn.Linear(10, 12), nn.Conv2d(7, 4, 3), nn.Linear(5, 8)).to(dtype)
    layers = list(model)
    for layer, part in zip(layers, values.split([120, 252, 40]), strict=True):
        layer.weight.data = part.reshape(layer.weight.shape)

    mask = create_magnitude_mask(model, amount)
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=amount)
    for index, layer in enumerate(layers):
        assert torch.equal(mask[f"{index}.weight"], layer.weight_mask.bool())


# --- Models ---


def tied_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(9, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 9)}
    )
    model["b"].weight = model["a"].weight
    model["head"].weight = model["embed"].weight
    return model


def test_tied_weights_are_ranked_once():
    model = tied_model()
    mask = create_magnitude_mask(model, 0.5)
    assert (mask.names, mask.numel, mask.kept) == (("a.weight",), 16, 8)
    assert as_bytes(mask) == as_bytes(oracles.magnitude_mask({"a.weight": model["a"].weight}, 8))


def test_biases_patterns_and_the_models_order():
    model = tied_model()
    mask = create_magnitude_mask(model, 0.5, only_weights=False, include="embed.*", exclude="b.bias")
    ranked = prunable_parameters(model, "embed.*", "b.bias", only_weights=False)
    assert mask.names == tuple(ranked) == ("embed.weight", "a.weight", "a.bias", "head.bias")
    assert as_bytes(mask) == as_bytes(oracles.magnitude_mask(ranked, round(0.5 * mask.numel)))


def test_ranking_reads_only():
    model = tied_model()
    before = {name: oracles.bytes_of(value) for name, value in model.state_dict().items()}
    create_magnitude_mask(model, [0.1, 0.9])
    create_magnitude_mask(model, 0.5, use_histogram=False)
    compute_layerwise_magnitude_ticket(model, 0.5, layer_importance_weights={"a": 2})
    assert {name: oracles.bytes_of(value) for name, value in model.state_dict().items()} == before
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("use_histogram", [True, False])
def test_sparsity_zero_keeps_all(use_histogram):
    assert create_magnitude_mask(tied_model(), 0, use_histogram) == Mask.ones_like(tied_model())


def test_all_equal_weights_go_by_position():
    tensors = {"a": torch.ones(2, 3), "b": -torch.ones(4)}
    mask = create_magnitude_mask(tensors, 0.7)
    assert mask["a"].tolist() == [[False] * 3] * 2
    assert mask["b"].tolist() == [False, True, True, True]


def test_a_language_model_with_massive_ties(load_smollm2):
    """Its weights were four-bit numbers: whole blocks share a magnitude, which approximate thresholds miss."""
    model = load_smollm2(torch.bfloat16)
    numel = sum(weight.numel() for weight in prunable_parameters(model).values())
    masks = create_magnitude_mask(model, NINE)
    for sparsity, mask in zip(NINE, masks, strict=True):
        assert (mask.numel, mask.numel - mask.kept) == (numel, round(sparsity * numel))
    assert create_magnitude_mask(model, 0.5) == masks[4]  # by bracket, the list by radix


@pytest.mark.slow
def test_a_language_model_by_sorting(load_smollm2):
    model = load_smollm2(torch.bfloat16)
    assert create_magnitude_mask(model, NINE) == create_magnitude_mask(model, NINE, use_histogram=False)


# --- Collapse ---


def test_a_tensor_that_is_emptied_is_named_once(recwarn):
    warnings.simplefilter("always")
    tensors = {"small.weight": torch.full((4,), 0.1), "large.weight": torch.ones(4), "empty": torch.empty(0)}
    with pytest.warns(LayerCollapseWarning) as caught:
        create_magnitude_mask(tensors, [0.25, 0.5, 0.75])
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "sparsity 0.5: small.weight; sparsity 0.75: small.weight" in message
    assert "min_density" in message
    assert "large.weight" not in message and "empty" not in message
    assert caught[0].filename == __file__


def test_no_collapse_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        create_magnitude_mask({"a": torch.full((4,), 0.1), "b": torch.ones(4)}, 0.5, min_density=0.25)
        create_magnitude_mask({"a": torch.full((4,), 0.1), "b": torch.ones(4)}, 0.25)


# --- Layer by layer ---


@settings(max_examples=40)
@given(weights(), sparsities(), st.lists(st.floats(2**-20, 2**20), min_size=5, max_size=5))
def test_weighted_global_ranking(tensors, sparsity, factors):
    importance = dict(zip(tensors, factors, strict=False))
    removed = round(sparsity * numel_of(tensors))
    ticket = compute_layerwise_magnitude_ticket(tensors, sparsity, layer_importance_weights=importance)
    expected = oracles.magnitude_mask(tensors, removed, importance)
    assert as_bytes(ticket["masks"]) == as_bytes(expected)
    assert ticket["threshold"] == oracles.threshold(tensors, removed, importance)
    assert ticket["method"] == ("global_weighted" if importance else "global")


@settings(max_examples=40)
@given(weights(), sparsities(), st.lists(st.floats(2**-20, 2**20), min_size=5, max_size=5))
def test_weighted_shares(tensors, sparsity, factors):
    importance = dict(zip(tensors, factors, strict=False))
    removed = round(sparsity * numel_of(tensors))
    ticket = compute_layerwise_magnitude_ticket(tensors, sparsity, False, importance)
    numels = {name: tensor.numel() for name, tensor in tensors.items()}
    removals = oracles.removals_by_weight(numels, importance, removed)
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        expected |= oracles.magnitude_mask({name: tensor}, removals[name])
    assert as_bytes(ticket["masks"]) == as_bytes(expected)
    assert ticket["threshold"] == {
        name: oracles.threshold({name: tensor}, removals[name]) for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("use_global_ranking", [True, False])
def test_the_ticket_says_what_it_is(use_global_ranking):
    model = tied_model()
    ticket = compute_layerwise_magnitude_ticket(model, 0.5, use_global_ranking)
    assert ticket["masks"] == create_magnitude_mask(model, 0.5, scope="global" if use_global_ranking else "layer")
    assert ticket["layer_sparsities"] == ticket["masks"].layer_sparsity()
    assert ticket["overall_sparsity"] == ticket["masks"].sparsity == 0.5
    assert ticket["method"] == ("global" if use_global_ranking else "layer")


def test_more_important_layers_keep_more():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    plain = compute_layerwise_magnitude_ticket(model, 0.8)["layer_sparsities"]
    for use_global_ranking in (True, False):
        for layer in ("0", "0.weight"):
            found = compute_layerwise_magnitude_ticket(model, 0.8, use_global_ranking, {layer: 3.0})
            assert found["layer_sparsities"]["0.weight"] < plain["0.weight"]
            assert found["masks"].kept == 160


# --- Memory ---

MEASURE = """
import sys, torch
from lottery_tickets import create_magnitude_mask

dtype, sparsities = getattr(torch, sys.argv[1]), eval(sys.argv[2])
torch.set_num_threads(2)
small = {"w": torch.randn(5_000_000).to(dtype)}
create_magnitude_mask(small, sparsities, progress=False)
del small
sizes = [6_000_000] * 8 + [2_000_000]
weights = {f"w{i}": torch.empty(size, dtype=dtype).normal_() for i, size in enumerate(sizes)}
if sys.argv[3] == "scattered":
    weights = {name: weight.view(2000, -1).t() for name, weight in weights.items()}
before = peak()
masks = create_magnitude_mask(weights, sparsities, progress=False)
print(peak() - before, sum(sizes), len(masks) if isinstance(masks, list) else 1)
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("asked", "layout"), [("0.9", "plain"), ("[0.5, 0.9]", "plain"), ("0.9", "scattered")])
def test_peak_memory_is_the_masks_and_64_mib(dtype, asked, layout):
    """Above the weights, in a process of its own: N / 8 bytes a mask and a constant."""
    extra, numel, masks = map(int, run_python(PEAK + MEASURE, dtype, asked, layout).split())
    assert extra <= masks * numel / 8 + (64 << 20)


# --- What is refused ---


@pytest.mark.parametrize(
    "sparsity", [1, 1.0, -0.1, 90, float("nan"), "0.5", None, True, torch.tensor(0.5), [0.5, 1.0]]
)
def test_sparsities_outside_are_refused(sparsity):
    with pytest.raises(SparsityError, match=r"sparsity is the fraction removed, a number in \[0, 1\); got"):
        create_magnitude_mask({"w": torch.ones(3)}, sparsity)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_numpys_numbers_are_numbers(kind):
    assert create_magnitude_mask({"w": torch.arange(4.0)}, kind(0.5)).kept == 2
    assert [mask.kept for mask in create_magnitude_mask({"w": torch.arange(4.0)}, np.array([0.25, 0.5]))] == [3, 2]


def test_scopes_are_three():
    with pytest.raises(SparsityError, match="scope is 'global', 'layer' or 'row', got 'local'"):
        create_magnitude_mask({"w": torch.ones(3)}, 0.5, scope="local")


def test_patterns_choose_among_a_models_parameters():
    with pytest.raises(ParameterSelectionError, match="of a mapping every tensor is ranked"):
        create_magnitude_mask({"w": torch.ones(3)}, 0.5, include="w")


@pytest.mark.parametrize("min_density", [-0.1, 1.0, float("nan")])
def test_floors_outside_are_refused(min_density):
    with pytest.raises(SparsityError, match="min_density is"):
        create_magnitude_mask({"w": torch.ones(3)}, 0.5, min_density=min_density)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({"decoder": 2.0}, "no prunable layer is called 'decoder'; names look like 'a.weight'"),
        ({"head": 2.0}, "no prunable layer is called 'head'"),
        ({"a": 0.0}, r"\['a'\]: expected a positive number, got 0\.0"),
        ({"a": -1.0}, "expected a positive number, got -1"),
        ({"a": float("nan")}, "expected a positive number, got nan"),
        ({"a": float("inf")}, "expected a positive number, got inf"),
        ({"a": "2"}, "expected a positive number, got '2'"),
        ({"a": None}, "expected a positive number, got None"),
    ],
)
@pytest.mark.parametrize("use_global_ranking", [True, False])
def test_importance_of_unknown_layers_and_no_importance(importance, message, use_global_ranking):
    with pytest.raises(SparsityError, match=message):
        compute_layerwise_magnitude_ticket(tied_model(), 0.5, use_global_ranking, importance)


def test_nan_is_refused_with_its_place():
    model = tied_model()
    model["a"].weight.data[0, 0] = float("nan")
    for use_histogram in (True, False):
        with pytest.raises(WeightsError, match=r"a\.weight \(1\).* nan='prune'"):
            create_magnitude_mask(model, 0.5, use_histogram)
    with pytest.raises(WeightsError, match=r"a\.weight \(1\)"):
        compute_layerwise_magnitude_ticket(model, 0.5)
