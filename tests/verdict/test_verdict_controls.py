"""Masks and weights of the controls: what each shares with the ticket, and what not."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_tickets import Mask
from lottery_tickets._verdict._controls import MASKS, fresh_seed
from lottery_tickets._verdict._early_bird import early_bird
from lottery_tickets.training import Recipe

SHAPES = [(7, 5), (5,), (3, 2, 2), (0, 4), (1,)]


@st.composite
def tickets(draw):
    seed = draw(st.integers(0, 10_000))
    density = draw(st.sampled_from([0.05, 0.3, 0.5, 0.9]))
    generator = torch.Generator().manual_seed(seed)
    chosen = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4))
    return Mask.from_tensors(
        {f"{place}.weight": torch.rand(shape, generator=generator) < density for place, shape in enumerate(chosen)}
    )


@given(tickets(), st.integers(0, 2**31))
def test_a_random_mask_keeps_as_many_weights_in_all(ticket, seed):
    control = MASKS["random_mask"](ticket, seed)
    assert control.shapes == ticket.shapes
    assert control.kept == ticket.kept


@given(tickets(), st.integers(0, 2**31))
def test_a_shuffled_mask_keeps_as_many_in_each_tensor(ticket, seed):
    control = MASKS["layer_shuffled"](ticket, seed)
    assert control.layer_kept() == ticket.layer_kept()


@given(tickets(), st.integers(0, 2**31))
def test_what_is_not_random_is_the_tickets_own(ticket, seed):
    assert MASKS["ticket"](ticket, seed) is ticket
    assert MASKS["random_reinit"](ticket, seed) is ticket
    assert MASKS["dense"](ticket, seed) is None


def test_random_masks_hang_on_the_seed_and_on_nothing_else_of_the_ticket():
    ticket = Mask.from_tensors({"a": torch.eye(40) > 0, "b": torch.ones(40, 40)})
    for name in ("random_mask", "layer_shuffled"):
        masks = [MASKS[name](ticket, seed) for seed in range(6)]
        assert len(set(masks)) == 6
        assert MASKS[name](ticket, 3) == masks[3]
        moved = {"a": ticket["a"].flip(0), "b": ticket["b"]}
        assert MASKS[name](Mask.from_tensors(moved), 3) == masks[3]
    assert MASKS["random_mask"](ticket, 0).layer_kept() != ticket.layer_kept()


def test_a_random_mask_is_uniform_over_all_tensors():
    """Each weight is kept as often as any other, wherever it lies: 400 masks of 6 of 12 weights."""
    ticket = Mask.from_tensors({"a": torch.ones(6), "b": torch.zeros(6)})
    masks = [MASKS["random_mask"](ticket, seed) for seed in range(400)]
    kept = sum(torch.cat([mask["a"], mask["b"]]).long() for mask in masks)
    assert int(kept.sum()) == 6 * 400
    assert ((kept - 200).abs() < 50).all(), "five standard deviations"


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20, unique=True))
def test_fresh_seeds_are_nobody_elses(seeds):
    fresh = {seed: fresh_seed(seed, seeds) for seed in seeds}
    assert not set(fresh.values()) & set(seeds)
    assert len(set(fresh.values())) == len(seeds)
    assert all(0 <= one < 2**31 for one in fresh.values())


def test_a_fresh_seed_that_is_taken_gives_way():
    first = fresh_seed(0, ())
    assert fresh_seed(0, (first,)) != first
    assert fresh_seed(0, (1, 2, 3)) == first, "it does not hang on the seeds beside it"


class Tied(nn.Module):
    """A network whose output layer is a tensor of its input layer's."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.middle = nn.Linear(6, 6)
        self.last = nn.Linear(6, 6, bias=False)
        self.last.weight = self.first.weight

    def forward(self, inputs):
        return self.last(torch.relu(self.middle(self.first(inputs))))


@pytest.mark.parametrize("make", [Tied, lambda: nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6))])
@pytest.mark.parametrize("whole", [True, False])
def test_an_early_bird_prunes_the_tensors_that_the_ticket_prunes(make, whole):
    torch.manual_seed(0)
    model = make()
    names = list(Mask.ones_like(model).names)
    chosen = names if whole else names[:1]
    kept = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    ticket = Mask.from_tensors(dict.fromkeys(chosen, kept))
    inputs = torch.randn(16, 6)
    data = [(inputs, torch.arange(16) % 6)]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    mask, settled = early_bird(model, data, ticket, Recipe(learning_rate=0.1), epochs=3, seed=0, progress=False)
    assert mask.shapes == ticket.shapes
    assert mask.kept == ticket.kept
    assert settled is None, "three epochs are too few for a window of five"
    assert any(not torch.equal(before[name], one) for name, one in model.state_dict().items())


def test_an_early_bird_of_every_parameter_there_is():
    model = nn.Linear(6, 6, bias=False)
    ticket = Mask.from_tensors({"weight": torch.eye(6)})
    data = [(torch.randn(16, 6), torch.arange(16) % 6)]
    mask, settled = early_bird(model, data, ticket, Recipe(learning_rate=1e-3), epochs=8, seed=0, progress=False)
    assert mask.kept == 6
    assert settled is not None
