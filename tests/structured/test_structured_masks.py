"""Which units go, and what the mask says of the weights."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lottery_tickets import create_importance_mask, create_structured_mask
from lottery_tickets._structured._ranking import Ranking, Rule
from lottery_tickets.errors import SparsityError, StructureError, WeightsError
from lottery_tickets.masks import Part, UnitGroup, Units
from unit_networks import Residual, image, llama, scattered, tokens


def chain(counts):
    """Units of a chain of layers: group g owns the rows of w_g and the columns of w_(g+1); names and shapes."""
    sizes = [3, *counts, 2]
    shapes = {f"w{place}": torch.Size((out, into)) for place, (into, out) in enumerate(pairwise(sizes))}
    groups = tuple(
        UnitGroup(
            f"g{place}",
            "neuron",
            count,
            (Part(f"w{place}", 0, np.arange(count)), Part(f"w{place + 1}", 1, np.arange(count))),
        )
        for place, count in enumerate(counts)
    )
    return Units(groups), shapes


def removed_slowly(counts, scores, sparsity, rule):
    """Units go one by one, the lowest first, until the next would take too many: (group, unit) in their order."""
    sizes = [3, *counts, 2]

    def cost(gone):
        if rule.count == "units":
            return len(gone)
        left = [size - sum(group == place - 1 for group, _ in gone) for place, size in enumerate(sizes)]
        return sum(a * b for a, b in pairwise(sizes)) - sum(a * b for a, b in pairwise(left))

    numel = sum(counts) if rule.count == "units" else cost([]) + sum(a * b for a, b in pairwise(sizes))
    target = round(sparsity * numel)
    gone = []
    while True:
        candidates = [
            (scores[group][unit], group, unit)
            for group, count in enumerate(counts)
            for unit in range(count)
            if (group, unit) not in gone and count - sum(its == group for its, _ in gone) > rule.min_units
        ]
        if not candidates:
            return gone
        *_, group, unit = min(candidates)
        if cost([*gone, (group, unit)]) > target:
            return gone
        gone.append((group, unit))


@settings(max_examples=60)
@given(st.data())
def test_units_go_in_order_and_no_more_than_asked(data):
    counts = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    scores = [
        data.draw(st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, 3.0]), min_size=n, max_size=n)) for n in counts
    ]
    sparsity = data.draw(st.floats(0, 0.99))
    rule = Rule(count=data.draw(st.sampled_from(["parameters", "units"])), min_units=data.draw(st.integers(1, 2)))
    units, shapes = chain(counts)
    ranking = Ranking(units, {f"g{n}": np.array(one) for n, one in enumerate(scores)}, shapes, rule)
    try:
        (kept,) = ranking.kept([sparsity])
    except SparsityError:
        most = len(removed_slowly(counts, scores, 1.0, rule))
        assert most == sum(max(0, count - rule.min_units) for count in counts)
        return
    gone = {(int(name[1:]), int(unit)) for name, found in kept.items() for unit in np.flatnonzero(~found)}
    assert gone == set(removed_slowly(counts, scores, sparsity, rule))


@settings(max_examples=40)
@given(st.data())
def test_masks_are_nested_and_counts_exact(data):
    counts = data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=3))
    generator = np.random.default_rng(data.draw(st.integers(0, 99)))
    rule = Rule(
        scope=data.draw(st.sampled_from(["global", "layer"])),
        count=data.draw(st.sampled_from(["parameters", "units"])),
        round_to=data.draw(st.sampled_from([None, 2, 3])),
    )
    units, shapes = chain(counts)
    ranking = Ranking(units, {g.name: generator.random(g.count) for g in units.groups}, shapes, rule)
    sparsities = [0.0, 0.1, 0.2, 0.3]
    try:
        found = ranking.kept(sparsities)
    except SparsityError as error:
        assert "at most" in str(error)
        return
    for sparsity, kept in zip(sparsities, found, strict=True):
        bits = units.packed(kept, shapes)
        left = sum(int(np.bitwise_count(packed).sum()) for packed in bits.values())
        removed = ranking.numel - (left if rule.count == "parameters" else sum(one.sum() for one in kept.values()))
        assert 0 <= removed <= round(sparsity * ranking.numel)
        for group in units.groups:
            number = int(kept[group.name].sum())
            assert number >= 1
            assert rule.round_to is None or number == group.count or number % rule.round_to == 0
    for more, less in pairwise(found):
        assert all((more[name] | ~less[name]).all() for name in more)


def test_selection_is_that_of_single_scores():
    """By number of units, over one group and over several, units are what weights are to a mask."""
    units, shapes = chain([7, 5])
    scores = {"g0": np.array([3.0, 1, 1, 2, 1, 5, 0]), "g1": np.array([1.0, 4, 0, 1, 1])}
    (kept,) = Ranking(units, scores, shapes, Rule(count="units")).kept([0.5])
    expected = create_importance_mask({name: torch.tensor(one) for name, one in scores.items()}, 0.5)
    assert all(np.array_equal(kept[name], expected[name].numpy()) for name in scores)


def test_bits_are_those_of_the_units():
    model = scattered(Residual())
    mask = create_structured_mask(model, 0.4, example_inputs=image())
    units, kept = mask.units, mask.units.kept_in(mask)
    assert not all(one.all() for one in kept.values())
    for name, bits in mask.items():
        expected = torch.ones(bits.shape, dtype=torch.bool)
        for group in units.groups:
            for part in group.parts:
                for index, owner in enumerate(part.owners):
                    if part.name == name and owner >= 0 and not kept[group.name][owner]:
                        expected.select(part.dim, index).fill_(False)
        assert torch.equal(bits, expected), name
    assert all(name in dict(model.named_parameters()) for name in mask)


def test_magnitude_and_l1_against_slices():
    model = scattered(Residual())
    hidden, out = model.hidden.weight.detach().double(), model.out.weight.detach().double()
    weights = [torch.cat([hidden[unit], out[:, unit]]) for unit in range(10)]
    for criterion, score in (("magnitude", lambda w: w.square().mean().sqrt()), ("l1", lambda w: w.abs().mean())):
        order = sorted(range(10), key=lambda unit: float(score(weights[unit])))
        mask = create_structured_mask(
            model, 0.3, unit="neuron", count="units", criterion=criterion, example_inputs=image()
        )
        gone = np.flatnonzero(~mask.units.kept_in(mask)["hidden"]).tolist()
        assert gone == sorted(order[:3])


def test_scales_of_normalisation():
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([0.5, -0.1, 0.1, 2.0, -3.0, 0.2]))
    mask = create_structured_mask(model, 0.5, criterion="bn_scale", count="units", example_inputs=image())
    assert mask["1.weight"].tolist() == [True, False, False, True, True, False]
    with pytest.raises(StructureError, match="hidden: the criterion says nothing"):
        create_structured_mask(Residual(), 0.5, unit="neuron", criterion="bn_scale", example_inputs=image())


def test_scores_of_weights_are_summed():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    scores = {"0.weight": torch.zeros(4, 3), "2.weight": torch.tensor([[0.0, -2, 3, 1], [0, 0, 0, 0]])}
    mask = create_structured_mask(model, 0.5, unit="neuron", criterion=scores, count="units")
    assert mask["0.bias"].tolist() == [False, False, True, True]
    with pytest.raises(StructureError, match=r"shape \(3, 4\)"):
        create_structured_mask(model, 0.5, unit="neuron", criterion={"0.weight": torch.zeros(3, 4)})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_ties_by_position_in_every_type(dtype):
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
    mask = create_structured_mask(model, 0.4, unit="neuron", count="units")
    assert mask["0.bias"].tolist() == [False, False, True, True, True]


def test_uniform_layers_stay_alike():
    model = llama()
    masks = create_structured_mask(
        model, [0.2, 0.5], unit="neuron", count="units", allocation="uniform", example_inputs=tokens()
    )
    for mask, left in zip(masks, (16, 10), strict=True):
        assert {int(one.sum()) for one in mask.units.kept_in(mask).values()} == {left}
    same = create_structured_mask(model, 0.5, unit="neuron", count="units", scope="layer")
    assert same == masks[1]


def test_some_layers_by_name():
    model = llama()
    mask = create_structured_mask(
        model, 0.5, unit="neuron", count="units", allocation={"model.layers.0.*": 0.25}, example_inputs=tokens()
    )
    assert [int(one.sum()) for one in mask.units.kept_in(mask).values()] == [15, 5]


def test_the_same_whatever_the_number_of_threads():
    model = scattered(Residual(channels=16, inner=24, hidden=64))
    threads, digests = torch.get_num_threads(), set()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            digests.add(create_structured_mask(model, 0.3, example_inputs=image()).digest())
    finally:
        torch.set_num_threads(threads)
    assert len(digests) == 1


ERRORS = {
    "unit": ({"unit": "layer"}, StructureError, "unit is 'channel', 'head' or 'neuron'"),
    "no such units": ({"unit": "head"}, StructureError, "Its units are of the kind 'neuron'"),
    "criterion": ({"criterion": "size"}, StructureError, "criterion is 'bn_scale'"),
    "scope": ({"scope": "row"}, SparsityError, "scope is 'global' or 'layer'"),
    "allocation": ({"allocation": "erk"}, SparsityError, "allocation is 'global', 'uniform' or a dict"),
    "both": ({"scope": "layer", "allocation": {"0": 0.5}}, SparsityError, "contradict"),
    "count": ({"count": "layers"}, SparsityError, "count is 'parameters' or 'units'"),
    "min_units": ({"min_units": 0}, SparsityError, "would cut the network"),
    "round_to": ({"round_to": 2.5}, SparsityError, "round_to is a positive integer"),
    "too many": ({"min_units": 3, "count": "units"}, SparsityError, "at most 1 can go"),
    "everything": ({"sparsity": 1.0}, SparsityError, r"in \[0, 1\)"),
    "no group": ({"allocation": {"9": 0.5}}, SparsityError, "'9' matches no group"),
    "exclude": ({"exclude": "9"}, StructureError, "exclude: '9' matches no group"),
    "all excluded": ({"exclude": "*"}, StructureError, "leaves no units"),
}


@pytest.mark.parametrize(("arguments", "error", "match"), ERRORS.values(), ids=ERRORS)
def test_what_cannot_be_is_said(arguments, error, match):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(error, match=match):
        create_structured_mask(model, **{"sparsity": 0.5, "unit": "neuron", **arguments})


def test_weights_without_values_are_said():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[1, 1] = torch.nan
    with pytest.raises(WeightsError, match="1 of its 4 units score NaN"):
        create_structured_mask(model, 0.5, unit="neuron")
    with pytest.raises(WeightsError, match="meta"):
        create_structured_mask(model.to("meta"), 0.5, unit="neuron")


def test_shares_are_exact_fractions():
    """0.29 of 100 units are 29, not 28."""
    units, shapes = chain([100])
    (kept,) = Ranking(units, {"g0": np.arange(100.0)}, shapes, Rule(count="units", scope="layer")).kept([0.29])
    assert Fraction(int(kept["g0"].sum()), 100) == Fraction(71, 100)
