"""Zeros where the mask says, sparsity and size; and one seed for everything."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from lottery_tickets import (
    Mask,
    applied,
    apply_mask,
    compute_sparsity,
    create_magnitude_mask,
    ensure_deterministic_pruning,
    get_model_size,
    validate_pruning_correctness,
)
from lottery_tickets.errors import CheckpointError, MaskError

# ---------------------------------------------------------------- validation


@given(
    bits=st.lists(st.booleans(), min_size=24, max_size=24),
    values=st.lists(st.sampled_from([0.0, -0.0, 1.0, float("nan"), float("inf")]), min_size=24, max_size=24),
    transposed=st.booleans(),
)
def test_wrong_weights_are_counted(bits: list[bool], values: list[float], transposed: bool) -> None:
    layer = nn.Linear(4, 6)
    weights, kept = torch.tensor(values).view(6, 4), torch.tensor(bits).view(6, 4)
    layer.weight.data = weights.t().contiguous().t() if transposed else weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lottery_tickets.inspection._BLOCK", 8)
        found = validate_pruning_correctness(layer, {"weight": kept})
    pairs = list(zip(bits, values, strict=True))
    not_zero = sum(not bit and value != 0 for bit, value in pairs)
    nan = sum(map(math.isnan, values))
    check = found["tensors"]["weight"]
    assert (check["pruned"], check["not_zero"], check["nan"]) == (bits.count(False), not_zero, nan)
    assert found["valid"] == (not_zero == nan == 0)
    assert len(found["problems"]) == (not_zero > 0) + (nan > 0)
    json.dumps(found)


def test_a_real_model_before_and_after_pruning(smollm2: nn.Module) -> None:
    mask = create_magnitude_mask(smollm2, 0.5)
    name = mask.names[3]
    with applied(smollm2, mask):  # nothing is stored
        before = validate_pruning_correctness(smollm2, mask)
    assert not before["valid"]
    check = before["tensors"][name]
    weight = dict(smollm2.named_parameters())[name]
    assert check["not_zero"] == int((weight[~mask[name]] != 0).sum()) > 0
    assert f"{name}: {check['not_zero']} of {check['pruned']} pruned weights are not zero" in before["problems"]
    apply_mask(smollm2, mask)
    after = validate_pruning_correctness(smollm2, mask)
    assert after["valid"]
    assert after["problems"] == []
    assert list(after["tensors"]) == list(mask)
    assert compute_sparsity(smollm2) >= compute_sparsity(mask) == mask.sparsity


def test_what_does_not_fit_is_reported() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"), nn.LazyLinear(2))
    names = ("0.weight", "1.weight", "2.weight", "3.weight")
    mask = {name: torch.ones(3, 2) for name in names}
    found = validate_pruning_correctness(model, mask)
    assert found["problems"] == [
        "0.weight: mask (3, 2), parameter (2, 2)",
        "1.weight: the parameter has no values (meta device, or not initialised)",
        "2.weight: the parameter has no values (meta device, or not initialised)",
        "3.weight: the model has no such parameter",
    ]
    assert not found["valid"]
    with pytest.raises(MaskError, match="a mask holds only 0 and 1"):
        validate_pruning_correctness(model, {"0.weight": torch.full((2, 2), 0.5)})


def test_a_checkpoint_is_looked_at_on_disk_as_the_loaded_model_is(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    mask = create_magnitude_mask(model, 0.5)
    apply_mask(model, mask)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, :2] = float("nan")
    model.save_pretrained(tmp_path / "model", max_shard_size="1KB")
    assert validate_pruning_correctness(tmp_path / "model", mask) == validate_pruning_correctness(model, mask)
    bare = {name.removeprefix("model."): mask[name] for name in mask if name != "lm_head.weight"}
    assert (
        validate_pruning_correctness(model.model, bare)["problems"]
        == (validate_pruning_correctness(tmp_path / "model", bare)["problems"])
    ), "the files say model. before each name"
    other = {"gone": torch.ones(2), "lm_head.weight": torch.ones(3, 3)}
    assert validate_pruning_correctness(str(tmp_path / "model"), other)["problems"] == [
        "gone: the model has no such parameter",
        "lm_head.weight: mask (3, 3), parameter (16, 8)",
    ]
    with pytest.raises(CheckpointError, match="neither a folder here nor"):
        validate_pruning_correctness("nothing", mask)


def damaged() -> tuple[nn.Sequential, Mask]:
    """A pruned network with rows that ranks cannot share evenly, some of its zeros filled, and a NaN."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))
    mask = create_magnitude_mask(model, 0.6)
    apply_mask(model, mask)
    with torch.no_grad():
        for weight, name in ((model[0].weight, "0.weight"), (model[2].weight, "2.weight")):
            filled = (~mask[name]).nonzero()[::3]
            weight[tuple(filled.T)] = 1.0
        model[0].weight[-1, -1] = float("nan")
    return model, mask


def check_in_parts(rank: int) -> Any:
    model, mask = damaged()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    other = {"gone": torch.ones(2), "0.weight": torch.ones(2, 2), "2.weight": mask["2.weight"]}
    return validate_pruning_correctness(model, mask), validate_pruning_correctness(model, other)


def test_a_model_in_parts_is_checked_as_the_whole_one(ranks):
    model, mask = damaged()
    whole = validate_pruning_correctness(model, mask)
    assert all(check["not_zero"] for check in whole["tensors"].values())
    assert whole["tensors"]["0.weight"]["nan"] == 1
    for found, misfits in ranks(4).run(check_in_parts):
        assert found == whole
        assert len(misfits["problems"]) == 3


# ---------------------------------------------------------------- sparsity and size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_sparsity_of_a_tensor(dtype: torch.dtype) -> None:
    assert compute_sparsity(torch.tensor([0, 0, 1, 0]).to(dtype)) == 0.75
    assert compute_sparsity(torch.zeros(0, dtype=dtype)) == 0.0


def test_sparsity_of_models_masks_and_neither() -> None:
    model = nn.Sequential(nn.Linear(4, 2), nn.LayerNorm(2), nn.Linear(2, 4))
    nn.init.ones_(model[0].weight)
    model[2].weight.data = torch.tensor([[0.0, -0.0], [float("nan"), 1.0], [0.0, 2.0], [0.0, 3.0]])
    model[1].weight.data.zero_()
    assert compute_sparsity(model) == 4 / 16
    mask = Mask.from_tensors({"a": torch.tensor([1, 0]), "b": torch.tensor([0, 0])})
    assert compute_sparsity(mask) == compute_sparsity(dict(mask.items())) == 0.75
    for neither in ("mask.safetensors", 0.5, [torch.ones(2)]):
        with pytest.raises(MaskError, match="takes a mask, a tensor or a model, got"):
            compute_sparsity(neither)  # type: ignore[arg-type]
    with pytest.raises(MaskError, match="a mask holds only 0 and 1"):
        compute_sparsity({"w": torch.randn(3)})


def test_size_counts_tied_parameters_once(load_smollm2: Any) -> None:
    model = load_smollm2(torch.bfloat16)
    size = get_model_size(model)
    assert size["parameters"] == model.num_parameters() == sum(one.numel() for one in model.parameters())
    assert size["prunable_parameters"] == Mask.ones_like(model).numel < size["parameters"]
    assert size["bytes"] == sum(
        one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers())
    )
    assert size["bytes_by_dtype"]["bfloat16"] == 2 * size["parameters"]
    mask = Mask.ones_like(model)
    assert size["mask_bytes"] == sum(mask.packed(name).nbytes for name in mask)
    json.dumps(size)


def test_size_of_shared_memory_and_of_nothing_prunable() -> None:
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = nn.Parameter(first.weight.data, requires_grad=False)  # another Parameter, the same memory
    size = get_model_size(nn.Sequential(first, second, nn.BatchNorm1d(3)))
    assert (size["parameters"], size["prunable_parameters"], size["mask_bytes"]) == (9 + 6, 9, 2)
    assert size["buffers"] == 7
    assert size["bytes_by_dtype"] == {"float32": 4 * (15 + 6), "int64": 8}
    assert get_model_size(nn.Embedding(2, 3))["prunable_parameters"] == 0


# ---------------------------------------------------------------- determinism


@pytest.fixture
def settings_kept() -> Iterator[None]:
    """Undo what ensure_deterministic_pruning sets for the process."""
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


@pytest.mark.usefixtures("settings_kept")
def test_one_seed_for_every_stream() -> None:
    def draw(seed: int) -> tuple[Any, ...]:
        generator = ensure_deterministic_pruning(seed)
        order = torch.randperm(9, generator=generator).tolist()
        return random.random(), float(np.random.rand()), float(torch.rand(())), order

    assert draw(3) == draw(3)
    assert all(one != other for one, other in zip(draw(3), draw(4), strict=True))


@pytest.mark.usefixtures("settings_kept")
def test_deterministic_algorithms_are_on() -> None:
    ensure_deterministic_pruning(0)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    ensure_deterministic_pruning(0, warn_only=True)
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize("seed", [-1, 1 << 32, 1.0, True, None])
def test_seeds_that_are_refused(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"A seed is an integer from 0 to 2\^32 - 1, got"):
        ensure_deterministic_pruning(seed)
