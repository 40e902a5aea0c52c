"""N:M: exact in every group, ties by position, along the input dimension of every layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import oracles
from lottery_tickets import create_importance_mask, create_magnitude_mask
from lottery_tickets.errors import SparsityError, WeightsError
from lottery_tickets.sparsity import _patterns
from strategies import DTYPES, from_patterns, palettes

patterns = st.integers(2, 20).flatmap(lambda group: st.tuples(st.integers(1, group - 1), st.just(group)))


@st.composite
def layers(draw: st.DrawFn, group: int) -> torch.Tensor:
    """A weight of a linear or convolution layer that `group` divides, full of ties, sometimes turned in memory."""
    dtype = draw(st.sampled_from(DTYPES))
    kernel = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (draw(st.integers(1, 6)), group * draw(st.integers(1, 3)), *kernel)
    picked = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).choice(
        draw(palettes(dtype, nan=False)), size=shape
    )
    values = from_patterns(picked, dtype)
    return values.transpose(0, 1).contiguous().transpose(0, 1) if draw(st.booleans()) else values


@settings(max_examples=100)
@given(patterns, st.data())
def test_every_group_keeps_its_largest(pattern, data):
    kept, group = pattern
    weight = data.draw(layers(group))
    mask = create_magnitude_mask({"w": weight}, None, pattern=f"{kept}:{group}")["w"]
    assert torch.equal(mask, oracles.kept_by_pattern(weight.abs(), kept, group))
    in_groups = mask.movedim(1, -1).reshape(-1, group)
    assert bool((in_groups.sum(dim=1) == kept).all())


@settings(max_examples=50)
@given(patterns, st.data())
def test_signed_scores_rank_by_value(pattern, data):
    kept, group = pattern
    scores = data.draw(layers(group)).float().nan_to_num()
    largest = create_importance_mask({"w": scores}, None, pattern=f"{kept}:{group}")["w"]
    assert torch.equal(largest, oracles.kept_by_pattern(scores, kept, group))
    smallest = create_importance_mask({"w": scores}, None, pattern=f"{kept}:{group}", keep="smallest")["w"]
    assert torch.equal(smallest, oracles.kept_by_pattern(-scores, kept, group))


@pytest.mark.parametrize("kept, group", [(2, 4), (8, 32)])
def test_blocks_join_without_a_seam(monkeypatch, kept, group):
    """Blocks far smaller than the tensor: the bits are those of one block."""
    torch.manual_seed(0)
    weights = {"linear": torch.randint(-3, 4, (37, 3 * group)).float(), "conv": torch.randn(5, group, 3, 3)}
    whole = create_magnitude_mask(weights, None, pattern=f"{kept}:{group}")
    monkeypatch.setattr(_patterns, "block_size", lambda dtype, buffers: 64)
    assert create_magnitude_mask(weights, None, pattern=f"{kept}:{group}") == whole


def test_by_hand():
    """Ties: of two equal weights the earlier goes."""
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 4.0, -3.0, 2.0, 1.0]])
    mask = create_magnitude_mask({"w": weight}, 0.5, pattern="2:4")["w"]
    assert mask.tolist() == [[False, False, True, True, True, True, False, False]]


@pytest.mark.parametrize(
    "layer, input_dim",
    [
        (nn.Linear(8, 3), 1),
        (nn.Conv2d(8, 3, (2, 3)), 1),
        (nn.Conv2d(16, 4, 3, groups=2), 1),
        (nn.ConvTranspose2d(8, 3, (2, 3)), 0),
        (nn.ConvTranspose1d(16, 6, 3, groups=2), 0),
    ],
    ids=str,
)
def test_groups_follow_each_other_along_the_inputs(layer, input_dim):
    mask = create_magnitude_mask(layer, None, pattern="2:4")["weight"]
    assert torch.equal(mask, oracles.kept_by_pattern(layer.weight.abs(), 2, 4, input_dim))
    scored = create_importance_mask({"weight": layer.weight.abs()}, None, pattern="2:4", model=layer)
    assert torch.equal(scored["weight"], mask)


KINDS = ["Linear", "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "Conv1D"]


@settings(max_examples=60, deadline=None)
@given(patterns, st.sampled_from(KINDS), st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.data())
def test_exactly_n_of_every_m_inputs_of_any_layer_and_dtype(pattern, kind, times, groups, kernel, data):
    """An output's inputs, at one place of the kernel, in groups of M: N of each stay."""
    kept, group = pattern
    inputs, outputs = group * times, data.draw(st.integers(1, 4))
    if kind == "Linear":
        layer, groups = nn.Linear(inputs, outputs), 1
    elif kind == "Conv1D":
        layer, groups = pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs), 1
    else:
        layer = getattr(nn, kind)(inputs * groups, outputs * groups, kernel, groups=groups)
    layer.to(data.draw(st.sampled_from(DTYPES)))
    with torch.no_grad():
        layer.weight.copy_(layer.weight.mul(4).round())  # ties, zeros of both signs
    model = nn.Sequential(layer)
    scores = {"0.weight": layer.weight.detach().abs()}
    for mask in (
        create_magnitude_mask(model, None, pattern=f"{kept}:{group}")["0.weight"],
        create_importance_mask(scores, None, pattern=f"{kept}:{group}", model=model)["0.weight"],
    ):
        if kind == "Conv1D":
            seen = mask.t()
        elif "Transpose" in kind:  # (inputs of all groups, outputs of one, kernel)
            seen = torch.cat([part.transpose(0, 1) for part in mask.chunk(groups)])
        else:
            seen = mask
        assert seen.shape[:2] == (outputs * groups, inputs)
        counts = seen.movedim(1, -1).reshape(-1, group).sum(dim=1)
        assert counts.tolist() == [kept] * len(counts)


def test_groups_of_transformers_conv1d_lie_along_dimension_0():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)
    mask = create_magnitude_mask(conv1d, None, pattern="1:4")["weight"]
    assert torch.equal(mask, oracles.kept_by_pattern(conv1d.weight.abs(), 1, 4, input_dim=0))


def test_a_group_never_crosses_the_groups_of_a_layer():
    """12 inputs in 2 groups: 4 divides 12 but not the 6 inputs that an output sees."""
    with pytest.raises(SparsityError, match=r"not so: weight \(12, 2, 3\)"):
        create_magnitude_mask(nn.ConvTranspose1d(12, 4, 3, groups=2), None, pattern="2:4")


def test_it_is_what_torchs_semi_structured_tensors_take():
    """Two of every four along a row: torch's own check of 2:4 accepts the pruned weight."""
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    pruned = weight * create_magnitude_mask({"w": weight}, None, pattern="2:4")["w"]
    nonzero = (pruned.reshape(64, 32, 4) != 0).sum(dim=-1)
    assert bool((nonzero == 2).all())
    assert float(pruned.abs().sum()) == pytest.approx(float(weight.abs().reshape(-1, 4).topk(2).values.sum()))


def test_what_the_pattern_does_not_divide():
    weights = {"even": torch.randn(2, 8), "odd": torch.randn(2, 6), "bias": torch.randn(8)}
    with pytest.raises(SparsityError, match=r"that 4 divides; not so: odd \(2, 6\), bias \(8,\)\. pattern_rem"):
        create_magnitude_mask(weights, None, pattern="2:4")
    mask = create_magnitude_mask(weights, None, pattern="2:4", pattern_remainder="dense")
    assert mask.layer_kept() == {"even": 8, "odd": 12, "bias": 8}


def test_several_sparsities_and_the_patterns_own():
    weight = {"w": torch.randn(4, 6)}
    assert create_magnitude_mask(weight, 0.333, pattern="2:3").kept == 16
    assert len(create_magnitude_mask(weight, [0.5, 0.5], pattern="1:2")) == 2
    with pytest.raises(SparsityError, match=r"pattern='1:2' removes 0.5 of the weights, and sparsity says 0.7"):
        create_magnitude_mask(weight, 0.7, pattern="1:2")


@pytest.mark.parametrize("pattern", ["2", "2:2", "0:4", "4:2", "2:4:8", "a:b", "-1:4", 24, ""])
def test_what_is_no_pattern(pattern):
    with pytest.raises(SparsityError, match="pattern is 'N:M'"):
        create_magnitude_mask({"w": torch.ones(4, 4)}, None, pattern=pattern)


def test_nan_is_refused_or_goes_first():
    weight = torch.tensor([[float("nan"), 0.0, 1.0, 0.0]])
    with pytest.raises(WeightsError, match=r"found in w \(1\)"):
        create_magnitude_mask({"w": weight}, None, pattern="1:2")
    mask = create_magnitude_mask({"w": weight}, None, pattern="1:2", nan="prune")["w"]
    assert mask.tolist() == [[False, True, True, False]]


def test_empty_tensors():
    mask = create_magnitude_mask({"w": torch.empty(0, 4), "v": torch.empty(4, 0)}, None, pattern="2:4")
    assert mask.numel == 0
