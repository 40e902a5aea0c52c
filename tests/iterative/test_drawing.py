"""A mask inside an earlier one, where zeros were kept and others pruned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import oracles
from lottery_tickets import Mask
from lottery_tickets._iterative._drawing import draw, scores_of
from lottery_tickets._iterative._schedule import Group
from lottery_tickets.errors import LayerCollapseWarning, WeightsError
from strategies import weights

pytestmark = pytest.mark.filterwarnings("ignore::lottery_tickets.errors.LayerCollapseWarning")


def by_hand(tensors: dict[str, torch.Tensor], earlier: Mask, removed: int) -> dict[str, torch.Tensor]:
    """First those that went before, then the smallest, then the first: one list, sorted."""
    order = sorted(
        (bool(kept), abs(value), turn, name, position)
        for turn, (name, tensor) in enumerate(tensors.items())
        for position, (value, kept) in enumerate(
            zip(oracles.flat(tensor), earlier[name].flatten().tolist(), strict=True)
        )
    )
    return oracles.mask_without(tensors, [(score, turn, name, at) for _, score, turn, name, at in order[:removed]])


@given(weights(), st.integers(0, 2**32 - 1), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_it_is_the_sorted_one_and_leaves_the_weights_alone(
    tensors: dict[str, torch.Tensor], seed: int, before: float, share: float, by_layer: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draws = {name: torch.rand(one.shape, generator=generator) for name, one in tensors.items()}
    earlier = Mask.from_tensors({name: drawn >= before for name, drawn in draws.items()})
    for name, tensor in tensors.items():
        tensor.masked_fill_(~earlier[name], 0)
    untouched = {name: oracles.bytes_of(tensor) for name, tensor in tensors.items()}
    parts = [(name,) for name in tensors] if by_layer else [tuple(tensors)]
    groups = []
    for part in parts:
        gone = sum(tensors[name].numel() - int(earlier[name].sum()) for name in part)
        there = sum(tensors[name].numel() for name in part)
        groups.append(Group(part, (0, gone, gone + int(share * (there - gone)))))
    mask = draw(tensors, earlier, groups, 2)
    expected: dict[str, torch.Tensor] = {}
    for group in groups:
        expected |= by_hand({name: tensors[name] for name in group.names}, earlier, group.removed[2])
    assert all(torch.equal(mask[name], expected[name]) for name in tensors)
    assert {name: oracles.bytes_of(tensor) for name, tensor in tensors.items()} == untouched


def test_weights_that_are_kept_at_zero_do_not_change_places_with_pruned_ones():
    """The trap: among zeros alone the first would go, though others went before."""
    weights = {"w": torch.tensor([0.0, 0.0, 0.0, 1.0])}
    earlier = Mask.from_tensors({"w": torch.tensor([True, True, False, True])})
    mask = draw(weights, earlier, [Group(("w",), (0, 1, 2))], 2)
    assert mask["w"].tolist() == [False, True, False, True]


def test_nan_is_an_error_and_changes_nothing():
    weights = {"w": torch.tensor([0.0, float("nan"), 2.0])}
    earlier = Mask.from_tensors({"w": torch.tensor([False, True, True])})
    with pytest.raises(WeightsError, match="w"):
        draw(weights, earlier, [Group(("w",), (0, 1, 2))], 2)
    assert weights["w"][0] == 0


def test_a_collapsed_layer_is_told():
    weights = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([1.0, 2.0])}
    with pytest.warns(LayerCollapseWarning, match="a"):
        draw(weights, None, [Group(("a", "b"), (0, 2))], 1)


def test_scores_rank_in_the_place_of_weights():
    layer = nn.Linear(2, 2, bias=False)
    weights = dict(layer.named_parameters())
    given = {"weight": torch.tensor([[4.0, 3.0], [2.0, 1.0]])}
    scores = scores_of(lambda model: given, layer, weights)
    mask = draw(weights, None, [Group(("weight",), (0, 2))], 1, scores)
    assert mask["weight"].tolist() == [[True, True], [False, False]]
    scores = scores_of(lambda model: given, layer, weights)
    second = draw(weights, mask, [Group(("weight",), (0, 2, 3))], 2, scores)
    assert second["weight"].tolist() == [[True, False], [False, False]]
    assert given["weight"].tolist() == [[4.0, 3.0], [2.0, 1.0]], "the user's scores are not written to"


@pytest.mark.parametrize("given", [{}, {"weight": torch.ones(3)}], ids=["missing", "shape"])
def test_scores_that_do_not_fit(given: dict[str, torch.Tensor]) -> None:
    layer = nn.Linear(2, 2, bias=False)
    with pytest.raises(WeightsError, match=r"weight needs scores of shape \(2, 2\)"):
        scores_of(lambda model: given, layer, dict(layer.named_parameters()))
