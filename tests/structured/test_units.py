"""Which indices of which tensors leave together: read off graphs, and kept in ticket files."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lottery_tickets import Mask, create_structured_mask
from lottery_tickets._structured._drawing import units_of
from lottery_tickets.errors import MaskError, StructureError
from lottery_tickets.masks import Part, UnitGroup, Units
from unit_networks import Residual, bert, image, llama


def owned(units):
    """Group to its parts as (tensor, dimension, indices of the first unit)."""
    return {
        group.name: [(part.name, part.dim, np.flatnonzero(part.owners == 0).tolist()) for part in group.parts]
        for group in units.groups
    }


def test_channels_take_along_all_that_reads_or_scales_them():
    groups = owned(units_of(Residual(), "channel", image()))
    # A grouped convolution of two groups keeps as many channels in each: 0 and 4 of 8 leave together.
    assert groups["stem"] == [
        ("stem.weight", 0, [0, 4]),
        ("stem.bias", 0, [0, 4]),
        ("stem_norm.weight", 0, [0, 4]),
        ("stem_norm.bias", 0, [0, 4]),
        ("expand.weight", 1, [0, 4]),
        ("grouped.weight", 0, [0, 4]),
        ("grouped.bias", 0, [0, 4]),
        ("hidden.weight", 1, [*range(16), *range(64, 80)]),
        ("stem_norm.running_mean", 0, [0, 4]),
        ("stem_norm.running_var", 0, [0, 4]),
    ]
    # Two outputs of the depthwise convolution for each input, 24 in all; groups of 12 in the one after it.
    assert groups["expand"] == [
        ("expand.weight", 0, [0, 6]),
        ("expand_norm.weight", 0, [0, 6]),
        ("expand_norm.bias", 0, [0, 6]),
        ("depthwise.weight", 0, [0, 1, 12, 13]),
        ("depthwise.bias", 0, [0, 1, 12, 13]),
        ("slope.weight", 0, [0, 1, 12, 13]),
        ("grouped.weight", 1, [0, 1]),
        ("expand_norm.running_mean", 0, [0, 6]),
        ("expand_norm.running_var", 0, [0, 6]),
    ]
    assert list(groups) == ["stem", "expand"]


def test_neurons_of_a_head_of_classes():
    assert owned(units_of(Residual(), "neuron", image())) == {
        "hidden": [("hidden.weight", 0, [0]), ("hidden.bias", 0, [0]), ("out.weight", 1, [0])]
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_head_of_keys_and_values_takes_its_queries(attention):
    groups = owned(units_of(llama(attention=attention), "head"))
    prefix = "model.layers.1.self_attn"
    assert groups[f"{prefix}.q_proj"] == [
        (f"{prefix}.q_proj.weight", 0, list(range(8))),
        (f"{prefix}.k_proj.weight", 0, list(range(4))),
        (f"{prefix}.v_proj.weight", 0, list(range(4))),
        (f"{prefix}.o_proj.weight", 1, list(range(8))),
    ]
    assert list(groups) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def test_a_gated_layer_is_one():
    groups = owned(units_of(llama(), "neuron"))
    prefix = "model.layers.0.mlp"
    assert groups[f"{prefix}.gate_proj"] == [
        (f"{prefix}.gate_proj.weight", 0, [0]),
        (f"{prefix}.up_proj.weight", 0, [0]),
        (f"{prefix}.down_proj.weight", 1, [0]),
    ]
    assert len(groups) == 2


def test_heads_and_neurons_of_bert():
    model = bert()
    heads = owned(units_of(model, "head"))
    prefix = "bert.encoder.layer.0.attention"
    assert [name for name, *_ in heads[f"{prefix}.self.query"]] == [
        *(f"{prefix}.self.{one}.{what}" for one in ("query", "key", "value") for what in ("weight", "bias")),
        f"{prefix}.output.dense.weight",
    ]
    assert set(owned(units_of(model, "neuron", exclude="*pooler*"))) == {
        f"bert.encoder.layer.{layer}.intermediate.dense" for layer in range(2)
    }


class Strange(nn.Module):
    """Between two layers, something is done to what the first makes."""

    def __init__(self, what):
        super().__init__()
        self.first, self.second, self.what = nn.Linear(4, 6), nn.Linear(6, 2), what

    def forward(self, x):
        return self.second(self.what(self.first(x)))


MIXING = {
    "softmax": lambda x: x.softmax(-1),
    "mean taken off": lambda x: x - x.mean(-1, keepdim=True),
    "norm": lambda x: nn.functional.layer_norm(x, (6,)),
    "roll, which has no rule": lambda x: x.roll(1, -1),
    "half of it": lambda x: torch.cat([x[:, :3], x[:, :3]], -1),
    "sorted": lambda x: x.sort(-1).values,
    "a constant": lambda x: x + torch.arange(6.0),
    "seen by others": lambda x: x @ x.T @ x,
}


@pytest.mark.parametrize("what", MIXING.values(), ids=MIXING)
def test_what_mixes_units_keeps_them(what):
    with pytest.raises(StructureError, match="has no neuron that can leave"):
        units_of(Strange(what), "neuron")


KEEPING = {
    "activation": (torch.tanh, 1),
    "there and back": (lambda x: x.view(-1, 2, 3).transpose(1, 2).transpose(1, 2).reshape(-1, 6), 3),
    "gated by halves": (lambda x: torch.cat([x.chunk(2, -1)[0] * x.chunk(2, -1)[1]] * 2, -1), 2),
    "spread": (lambda x: x.unsqueeze(-1).expand(-1, -1, 1).squeeze(-1), 1),
    "added to itself, turned": (lambda x: (x.T + 1).T + x, 1),
}


@pytest.mark.parametrize(("what", "indices"), KEEPING.values(), ids=KEEPING)
def test_what_keeps_units_apart_lets_them_leave(what, indices):
    (group,) = units_of(Strange(what), "neuron").groups
    assert group.count == 6 // indices
    assert sorted(np.bincount(group.parts[0].owners).tolist()) == [indices] * group.count


def test_the_same_layer_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.again, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(self.again(torch.relu(self.again(self.into(x)))))

    (group,) = units_of(Twice(), "neuron").groups
    assert [(part.name, part.dim) for part in group.parts] == [
        ("into.weight", 0),
        ("into.bias", 0),
        ("again.weight", 0),
        ("again.weight", 1),
        ("again.bias", 0),
        ("out.weight", 1),
    ]


def test_what_cannot_be_traced_is_said():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(StructureError, match="Branching cannot be traced"):
        units_of(Branching(), "neuron")


def test_inputs_that_cannot_be_guessed_are_asked_for():
    with pytest.raises(StructureError, match="Pass example_inputs"):
        units_of(Residual(), "channel")
    with pytest.raises(StructureError, match="got str"):
        units_of(Residual(), "channel", "an image")


def test_modes_and_weights_are_left_alone():
    model = Residual().train()
    model.stem_norm.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    units_of(model, "channel", image())
    assert model.training
    assert not model.stem_norm.training
    assert model.expand_norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@given(st.lists(st.lists(st.integers(-1, 5), max_size=20), min_size=1, max_size=3))
def test_text_says_all(owners):
    parts = tuple(Part(f"w{number}", 0, np.array(one, np.int64)) for number, one in enumerate(owners))
    read = Units.from_json(Units((UnitGroup("layer", "neuron", 6, parts),)).to_json())
    (group,) = read.groups
    assert (group.name, group.kind, group.count) == ("layer", "neuron", 6)
    assert [part.owners.tolist() for part in group.parts] == owners


def test_text_is_short():
    owners = np.repeat(np.arange(1000), 3)
    assert len(Units((UnitGroup("layer", "head", 1000, (Part("w", 0, owners),)),)).to_json()) < 100


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "[1]",
        '[{"name":"a","kind":"layer","count":1,"parts":[]}]',
        '[{"name":"a","kind":"head","count":1,"parts":[["w",0,[[0,1,1000000000000]]]]}]',
        '[{"name":"a","kind":"head","count":1,"parts":[["w",0,[[0,2,1]]]]}]',
    ],
)
def test_text_of_others_is_refused(text):
    with pytest.raises(MaskError, match="does not describe units"):
        Units.from_json(text)


def test_a_ticket_file_knows_its_units(tmp_path):
    mask = create_structured_mask(Residual(), 0.4, example_inputs=image())
    mask.save(tmp_path / "ticket.safetensors", metadata={"seed": "0"})
    read = Mask.load(tmp_path / "ticket.safetensors")
    assert read == mask
    assert read.units.to_json() == mask.units.to_json()
    assert Mask.ones_like(mask).units is None
