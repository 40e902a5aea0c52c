"""The network without the units: the same function, of the same class, smaller."""

from __future__ import annotations

import copy
from importlib.metadata import version

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lottery_tickets import (
    Mask,
    applied,
    create_magnitude_mask,
    create_structured_mask,
    embed_subnetwork,
    extract_subnetwork,
    held,
)
from lottery_tickets._structured._checking import relative_error, tensors_in
from lottery_tickets._structured._drawing import units_of
from lottery_tickets.errors import MaskError, MaskMismatchError, StructureError
from lottery_tickets.masks import units_metadata
from unit_networks import Residual, bert, image, llama, scattered, tokens

FOUR = version("transformers").startswith("4.")  # BERT's code has the number of its heads written into it


def outputs(model, inputs):
    with torch.no_grad():
        return list(tensors_in(model(**inputs) if isinstance(inputs, dict) else model(inputs)))


def mask_of(model, units, kept):
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if name in units.names()}
    return Mask.from_packed(units.packed(kept, shapes), shapes, metadata=units_metadata(units))


def random_mask(model, units, seed):
    """Any units gone, at least one of each group left."""
    generator = np.random.default_rng(seed)
    kept = {group.name: generator.random(group.count) < generator.random() for group in units.groups}
    for one in kept.values():
        one[generator.integers(len(one))] = True
    return mask_of(model, units, kept)


def check_same(model, mask, inputs, *, loadable=True):
    """Bar: outputs within 1e-5, exactly the parameters gone that the mask removes, the model as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    small = extract_subnetwork(model, mask, example_inputs=inputs, loadable=loadable)
    with applied(model, mask):
        expected = outputs(model, inputs)
    assert relative_error(expected, outputs(small, inputs)) <= 1e-5
    sizes = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, small)]
    assert sizes[0] - sizes[1] == mask.numel - mask.kept
    assert type(small) is type(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return small


@settings(max_examples=3)
@given(
    channels=st.sampled_from([4, 6, 8]),
    inner=st.sampled_from([2, 6]),
    hidden=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
def test_convolutions(channels, inner, hidden, seed):
    model = scattered(Residual(channels, inner, hidden), seed)
    for kind in ("channel", "neuron"):
        mask = random_mask(model, units_of(model, kind, image()), seed)
        model = check_same(model, mask, image())
    assert model.stem.out_channels == model.stem_norm.num_features == len(model.stem.weight)
    assert model.depthwise.groups == model.depthwise.in_channels == model.expand.out_channels
    assert (model.grouped.groups, model.grouped.in_channels) == (2, model.depthwise.out_channels)
    assert model.hidden.in_features == 16 * model.stem.out_channels
    assert model.slope.num_parameters == model.depthwise.out_channels


@pytest.fixture(scope="module")
def transformers():
    """Model, its inputs, and units by kind."""
    found = []
    for model in (llama(), bert()):
        found.append((model, {kind: units_of(model, kind, tokens()) for kind in ("head", "neuron")}))
    return found


@pytest.mark.parametrize("number", range(2), ids=["llama", "bert"])
@pytest.mark.parametrize("kind", ["head", "neuron"])
def test_transformers_of_any_shape(transformers, number, kind):
    model, units = transformers[number]
    if FOUR and (kind, number) == ("head", 1):
        pytest.skip("transformers 4 has the number of BERT's heads in its code, and extraction is refused")
    for seed in range(2):
        check_same(model, random_mask(model, units[kind], seed), tokens(), loadable=False)


def test_from_pretrained_opens_a_llama(tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama()
    for unit in ("head", "neuron"):
        mask = create_structured_mask(model, 0.25, unit=unit, count="units", allocation="uniform")
        model = check_same(model, mask, tokens())
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(outputs(model, tokens()), outputs(read, tokens())) == 0
    config = read.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (6, 3, 4)
    assert config.intermediate_size == model.model.layers[0].mlp.intermediate_size == 15


def test_from_pretrained_opens_a_bert(tmp_path):
    from transformers import AutoModelForSequenceClassification

    model = bert()
    options = {"unit": "neuron", "count": "units", "allocation": "uniform", "exclude": "*pooler*"}
    small = check_same(model, create_structured_mask(model, 0.5, **options), tokens())
    small.save_pretrained(tmp_path)
    read = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert read.config.intermediate_size == 10
    assert relative_error(outputs(small, tokens()), outputs(read, tokens())) == 0


def test_what_no_configuration_says_is_refused():
    model = bert()
    with pytest.raises(StructureError, match=r"layers keep 2 heads.*loadable=False"):
        extract_subnetwork(model, create_structured_mask(model, 0.5, unit="head", allocation="uniform"))
    model = llama()
    unlike = create_structured_mask(
        model, 0.5, unit="neuron", count="units", allocation={"model.layers.0.*": 0.25}
    )
    with pytest.raises(StructureError, match=r"layers keep between 5 and 15 neurons.*allocation='uniform'"):
        extract_subnetwork(model, unlike)
    if FOUR:
        return
    # 24 inputs over 10 heads: transformers' own check of its configuration, from version 5 on.
    model = llama(kv_heads=6)
    odd = create_structured_mask(model, 0.2, unit="head", count="units", allocation="uniform")
    with pytest.raises(StructureError, match="multiple of the number of attention heads"):
        extract_subnetwork(model, odd)


def test_a_smaller_network_trains_and_goes_back():
    model = scattered(Residual())
    mask = create_structured_mask(model, 0.4, example_inputs=image())
    small = extract_subnetwork(model, mask).train()
    optimizer = torch.optim.SGD(small.parameters(), 0.1)
    small(image()).square().sum().backward()
    optimizer.step()
    small.eval()
    large = scattered(Residual(), seed=5)
    embed_subnetwork(small, mask, large)
    assert relative_error(outputs(small, image()), outputs(large, image())) <= 1e-5
    assert all(not large.get_parameter(name)[~bits].any() for name, bits in mask.items())
    again = extract_subnetwork(large, mask)
    assert all(torch.equal(one, other) for one, other in zip(small.parameters(), again.parameters(), strict=True))


def test_a_held_ticket_is_the_smaller_network():
    """Trained under its mask, biases and scales held too, the large network is what extraction leaves of it."""
    model = scattered(Residual())
    mask = create_structured_mask(model, 0.4, example_inputs=image())
    with held(model, mask):
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(image()).square().sum().backward()
            optimizer.step()
    model.eval()
    assert all(not model.get_parameter(name)[~bits].any() for name, bits in mask.items())
    small = extract_subnetwork(model, mask)
    assert relative_error(outputs(model, image()), outputs(small, image())) <= 1e-5


def test_modes_types_and_ties_stay():
    model = llama().bfloat16().train()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.norm.weight.requires_grad_(False)
    small = extract_subnetwork(
        model, create_structured_mask(model, 0.5, unit="neuron", count="units", allocation="uniform")
    )
    assert small.training
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert not small.model.norm.weight.requires_grad
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    shared = {one.data_ptr() for one in model.parameters()} & {one.data_ptr() for one in small.parameters()}
    assert not shared


def test_masks_that_are_not_of_units():
    model = scattered(Residual())
    with pytest.raises(StructureError, match="removes single weights"):
        extract_subnetwork(model, create_magnitude_mask(model, 0.5))
    mask = create_structured_mask(model, 0.4, example_inputs=image())
    cut = {name: bits.clone() for name, bits in mask.items()}
    cut["stem.weight"][...] = False
    cut["stem.weight"][0, 0, 0, 0] = True
    bits = Mask.from_tensors(cut)
    through = Mask.from_packed(
        {name: bits.packed(name) for name in bits.names}, bits.shapes, metadata=dict(mask.metadata)
    )
    with pytest.raises(StructureError, match="whole units"):
        extract_subnetwork(model, through)
    units = mask.units
    kept = {group.name: np.zeros(group.count, np.bool_) for group in units.groups}
    with pytest.raises(StructureError, match="every unit of stem, expand"):
        extract_subnetwork(model, mask_of(model, units, kept))
    with pytest.raises(MaskError, match="no tensor that its units"):
        extract_subnetwork(model, Mask.from_packed({}, {}, metadata=units_metadata(units)))


def test_models_that_do_not_fit():
    model = scattered(Residual())
    mask = create_structured_mask(model, 0.4, example_inputs=image())
    with pytest.raises(MaskMismatchError):
        extract_subnetwork(scattered(Residual(hidden=11, channels=4)), mask)
    small = extract_subnetwork(model, mask)
    with pytest.raises(MaskMismatchError, match="not what the mask leaves"):
        embed_subnetwork(copy.deepcopy(model), mask, model)
    with pytest.raises(MaskMismatchError):
        embed_subnetwork(model, mask, small)


def test_sizes_written_into_code_are_found():
    class Written(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.width = nn.Linear(4, 6), nn.Linear(6, 2), 6

        def forward(self, x):
            return self.second(self.first(x)) / self.first.weight.shape[0]

    model = Written()
    mask = create_structured_mask(model, 0.5, unit="neuron", count="units")
    with pytest.raises(StructureError, match="does not compute what it does with them masked"):
        extract_subnetwork(model, mask)


@pytest.mark.slow
def test_smollm2_without_neurons_and_heads(smollm2, tmp_path):
    from transformers import AutoModelForCausalLM

    inputs = {"input_ids": torch.randint(0, 49152, (1, 64), generator=torch.Generator().manual_seed(0))}
    model = smollm2
    for unit, share in (("neuron", 0.5), ("head", 1 / 3)):
        mask = create_structured_mask(model, share, unit=unit, count="units", allocation="uniform")
        model = check_same(model, mask, inputs)
    model.save_pretrained(tmp_path)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert relative_error(outputs(model, inputs), outputs(read, inputs)) == 0
    assert (read.config.intermediate_size, read.config.num_attention_heads) == (768, 6)
