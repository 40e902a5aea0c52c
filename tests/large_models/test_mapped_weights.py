"""Masks from checkpoint folders: those of the loaded model, bit for bit, however the weights are stored."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import oracles
from lottery_tickets import Mask, create_magnitude_mask
from lottery_tickets.errors import CheckpointError, ParameterSelectionError, SparsityError, WeightsError
from lottery_tickets.large_models import map_weights
from lottery_tickets.sparsity import _blocks, _selection
from processes import PEAK, run_python
from strategies import DTYPES, patterns_of, weights

MODEL_OF_NAMES = "model.layers.{}.mlp.up_proj.weight"


def llama(*, tied: bool = False, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=11,  # "layers.10" is stored before "layers.2"
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=24, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


def saved(model: PreTrainedModel, folder: Path, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    return folder


def loaded(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(llama(), tmp_path_factory.mktemp("sharded"), shards=True)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks, samples and brackets of real use at the size of a test."""
    monkeypatch.setattr(_blocks, "_LARGEST_BLOCK", 1024)
    monkeypatch.setattr(_blocks, "_SMALLEST_BLOCK", 1024)
    monkeypatch.setattr(_selection, "_BRACKET_FROM", 64)
    monkeypatch.setattr(_selection, "_SAMPLE_SHARE", 4)


@pytest.fixture
def without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)


def digests(masks: Mask | list[Mask]) -> list[str]:
    return [mask.digest() for mask in (masks if isinstance(masks, list) else [masks])]


# --- The mask of the loaded model ---


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_mask_of_the_model(tmp_path: Path, dtype: torch.dtype, tied: bool, shards: bool) -> None:
    folder = saved(llama(tied=tied, dtype=dtype), tmp_path, shards)
    model = loaded(folder)
    expected = create_magnitude_mask(model, 0.7)
    found = create_magnitude_mask(folder, 0.7)
    assert found.names == expected.names
    assert found.digest() == expected.digest()
    assert ("lm_head.weight" in found) is not tied


RULES: dict[str, dict[str, Any]] = {
    "several": {"sparsity": [0.9, 0.2, 0.5]},
    "many": {"sparsity": [round(0.05 * tenth, 2) for tenth in range(1, 20)]},
    "layer": {"sparsity": [0.5, 0.9], "scope": "layer"},
    "row": {"sparsity": 0.5, "scope": "row"},
    "uniform": {"sparsity": 0.7, "allocation": "uniform"},
    "erk": {"sparsity": [0.7, 0.8], "allocation": "erk"},
    "lamp": {"sparsity": 0.7, "allocation": "lamp"},
    "owl": {"sparsity": 0.7, "allocation": "owl"},
    "glob": {"sparsity": 0.5, "allocation": {"*.down_proj.weight": 0.1}},
    "rows of shares": {"sparsity": 0.5, "allocation": "erk", "scope": "row"},
    "2:4": {"sparsity": None, "pattern": "2:4"},
    "floor": {"sparsity": 0.9, "min_density": 0.05},
    "nan first": {"sparsity": 0.5, "nan": "prune"},
    "sorted": {"sparsity": [0.5, 0.6], "use_histogram": False},
    "embeddings too": {"sparsity": 0.5, "include": "*.embed_tokens.weight"},
    "some only": {"sparsity": 0.5, "exclude": ["*.mlp.*", "lm_head.*"]},
    "by predicate": {"sparsity": 0.5, "exclude": lambda name, weight: weight.shape[0] == 56},
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("arguments", RULES.values(), ids=RULES.keys())
def test_every_rule_as_for_a_module(sharded: Path, arguments: dict[str, Any]) -> None:
    expected = create_magnitude_mask(llama(), **arguments)
    assert digests(create_magnitude_mask(str(sharded), **arguments)) == digests(expected)


@pytest.mark.parametrize("arguments", [{"sparsity": 0.5, "scope": "row"}, {"sparsity": None, "pattern": "2:4"}])
def test_inputs_that_lie_in_the_first_dimension(tmp_path: Path, arguments: dict[str, Any]) -> None:
    folder = saved(gpt2(), tmp_path)
    expected = create_magnitude_mask(loaded(folder), only_weights=True, **arguments)
    assert create_magnitude_mask(folder, **arguments).digest() == expected.digest()


def test_biases_where_asked(tmp_path: Path) -> None:
    folder = saved(gpt2(), tmp_path)
    expected = create_magnitude_mask(loaded(folder), 0.5, only_weights=False)
    found = create_magnitude_mask(folder, 0.5, only_weights=False)
    assert found.digest() == expected.digest()
    assert "transformer.h.0.attn.c_attn.bias" in found


def test_saved_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    llama(tied=True).model.save_pretrained(tmp_path)
    expected = create_magnitude_mask(loaded(tmp_path), 0.5)
    assert create_magnitude_mask(tmp_path, 0.5).digest() == expected.digest()


def test_a_model_that_is_no_language_model(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    model = BertModel(config)
    model.save_pretrained(tmp_path)
    expected = create_magnitude_mask(model, 0.5)
    assert create_magnitude_mask(tmp_path, 0.5).digest() == expected.digest()


def test_a_head_that_is_stored_beside_what_it_is_tied_to(tmp_path: Path) -> None:
    """Loading ties them where they are equal; where they differ the head is a layer of its own."""
    for name, change in (("equal", 0.0), ("other", 1.0)):
        folder = saved(llama(tied=True), tmp_path / name)
        stored = load_file(folder / "model.safetensors")
        stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + change
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        found = create_magnitude_mask(folder, 0.5, include="*.embed_tokens.weight")
        expected = create_magnitude_mask(loaded(folder), 0.5, include="*.embed_tokens.weight")
        assert found.digest() == expected.digest(), name
        assert ("lm_head.weight" in found) == bool(change)


def test_a_tied_tensor_that_is_stored_under_its_other_name(tmp_path: Path) -> None:
    folder = saved(llama(tied=True), tmp_path)
    stored = load_file(folder / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    found = create_magnitude_mask(folder, 0.5, include="*.embed_tokens.weight")
    expected = create_magnitude_mask(loaded(folder), 0.5, include="*.embed_tokens.weight")
    assert found.digest() == expected.digest()
    assert "model.embed_tokens.weight" in found


def test_smollm2(smollm2_folder: Path, load_smollm2: Callable[..., LlamaForCausalLM]) -> None:
    expected = create_magnitude_mask(load_smollm2(torch.bfloat16), [0.5, 0.9])
    assert digests(create_magnitude_mask(smollm2_folder, [0.5, 0.9])) == digests(expected)


# --- However it is stored ---


def stored(tensors: dict[str, torch.Tensor], folder: Path, parts: list[int], padding: int) -> Path:
    """Shards by hand, in the order given, with headers of any length: weights need not lie aligned."""
    folder.mkdir()
    places = {}
    for part in sorted(set(parts)):
        file = f"model-{part}.safetensors"
        entries: dict[str, Any] = {}
        data = b""
        for (name, tensor), belongs in zip(tensors.items(), parts, strict=True):
            if belongs != part:
                continue
            content = patterns_of(tensor).tobytes()
            short = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
            entries[name] = {
                "dtype": short[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [len(data), len(data) + len(content)],
            }
            data += content
            places[name] = file
        header = json.dumps(entries).encode() + b" " * padding
        (folder / file).write_bytes(len(header).to_bytes(8, "little") + header + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(weights(), st.data())
def test_any_types_shards_and_alignment(tmp_path_factory, tensors, data) -> None:
    """The folder's mask is the oracle's on the tensors as they are stored."""
    named = {MODEL_OF_NAMES.format(index): tensor for index, tensor in enumerate(tensors.values())}
    named = {name: tensor if tensor.dim() > 1 else tensor.reshape(1, -1) for name, tensor in named.items()}
    if not named:
        return
    parts = data.draw(st.lists(st.integers(0, 2), min_size=len(named), max_size=len(named)))
    folder = stored(named, tmp_path_factory.mktemp("any") / "checkpoint", parts, data.draw(st.integers(0, 8)))
    sparsity = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.9]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocks, "_LARGEST_BLOCK", 64)
        patch.setattr(_blocks, "_SMALLEST_BLOCK", 64)
        patch.setattr(_selection, "_BRACKET_FROM", 64)
        patch.setattr(_selection, "_SAMPLE_SHARE", 4)
        found = create_magnitude_mask(folder, sparsity)
    removed = round(sparsity * sum(tensor.numel() for tensor in named.values()))
    expected = Mask.from_tensors(oracles.magnitude_mask(named, removed))
    assert found.digest() == expected.digest()
    assert found.digest() == create_magnitude_mask(named, sparsity).digest()


@pytest.mark.parametrize("dtype", DTYPES)
def test_data_at_an_odd_place(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {MODEL_OF_NAMES.format(0): torch.randn(60, 64).to(dtype)}
    for padding in range(8):
        folder = stored(tensors, tmp_path / str(padding), [0], padding)
        for arguments in ({}, {"scope": "row"}, {"allocation": "lamp"}, {"allocation": "owl"}):
            found = create_magnitude_mask(folder, 0.5, **arguments)
            assert found.digest() == create_magnitude_mask(tensors, 0.5, **arguments).digest(), arguments


# --- By names alone ---


@pytest.mark.usefixtures("without_transformers")
@pytest.mark.parametrize("tied", [False, True])
def test_by_names_as_by_architecture(tmp_path: Path, tied: bool) -> None:
    """Order included: the ties of a bfloat16 model settle differently in another order."""
    model = llama(tied=tied)
    folder = saved(model, tmp_path, shards=True)
    expected = create_magnitude_mask(model, [0.5, 0.9])
    found = create_magnitude_mask(folder, [0.5, 0.9])
    assert found[0].names == expected[0].names
    assert digests(found) == digests(expected)


@pytest.mark.parametrize("make", [gpt2, llama])
def test_by_names_without_a_configuration(tmp_path: Path, make: Callable[[], PreTrainedModel]) -> None:
    model = make()
    folder = saved(model, tmp_path)
    (folder / "config.json").unlink()
    expected = create_magnitude_mask(model, 0.5)
    assert create_magnitude_mask(folder, 0.5).names == expected.names
    assert create_magnitude_mask(folder, 0.5).digest() == expected.digest()


def test_a_tied_head_by_names_is_told_by_its_bytes(tmp_path: Path) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.randn(8, 4),
        "model.layers.0.mlp.up_proj.weight": torch.randn(8, 4),
    }
    for name, head in (("tied", tensors["model.embed_tokens.weight"].clone()), ("own", torch.randn(8, 4))):
        (tmp_path / name).mkdir()
        save_file({**tensors, "lm_head.weight": head}, tmp_path / name / "model.safetensors")
        found = create_magnitude_mask(tmp_path / name, 0.5)
        assert ("lm_head.weight" in found) == (name == "own")
        assert "model.embed_tokens.weight" not in found


def test_a_name_that_no_rule_knows(tmp_path: Path) -> None:
    save_file(
        {"net.mixer.weight": torch.randn(8, 4), "net.fc1.weight": torch.randn(4, 8)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(
        CheckpointError, match=r"whether net\.mixer\.weight is a layer cannot be told: there is no config\.json"
    ):
        create_magnitude_mask(tmp_path, 0.5)
    assert create_magnitude_mask(tmp_path, 0.5, include="*mixer*").names == ("net.fc1.weight", "net.mixer.weight")
    assert create_magnitude_mask(tmp_path, 0.5, exclude="*mixer*").names == ("net.fc1.weight",)


def test_rows_of_weights_that_may_lie_either_way(tmp_path: Path) -> None:
    folder = saved(gpt2(), tmp_path)
    (folder / "config.json").unlink()
    for arguments in ({"scope": "row", "sparsity": 0.5}, {"pattern": "2:4", "sparsity": None}):
        with pytest.raises(CheckpointError, match=r"is stored \(input, output\) by some models"):
            create_magnitude_mask(folder, **arguments)


# --- What is refused ---


def with_config(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def test_a_model_that_is_stored_otherwise_than_it_is_loaded(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for part in ("q", "k", "v"):
        tensors[f"model.layers.0.self_attn.{part}.weight"] = tensors.pop(
            f"model.layers.0.self_attn.{part}_proj.weight"
        )
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not stored as its model is loaded: LlamaForCausalLM has .*q_proj"):
        create_magnitude_mask(folder, 0.5)
    with pytest.raises(CheckpointError, match=r"loaded, being quantized: "):
        create_magnitude_mask(with_config(folder, quantization_config={"quant_method": "gptq"}), 0.5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_type_without_magnitudes(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved(llama(), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=rf"model\.safetensors: {name} is stored as (F8_E4M3|I8), which has no"
    ):
        create_magnitude_mask(folder, 0.5)
    assert name not in create_magnitude_mask(folder, 0.5, exclude=name)


def test_more_layers_than_tensors(tmp_path: Path) -> None:
    folder = with_config(saved(llama(), tmp_path), num_hidden_layers=10**9)
    with pytest.raises(
        CheckpointError, match=r"config\.json speaks of 1000000000 layers, and 102 tensors are stored"
    ):
        create_magnitude_mask(folder, 0.5)


def test_an_unknown_architecture_is_told_by_names(tmp_path: Path) -> None:
    folder = with_config(saved(llama(), tmp_path), model_type="never-heard-of")
    assert create_magnitude_mask(folder, 0.5).digest() == create_magnitude_mask(loaded_again(folder), 0.5).digest()


def loaded_again(folder: Path) -> torch.nn.Module:
    return loaded(with_config(folder, model_type="llama"))


def test_what_a_module_refuses_a_folder_refuses(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    with pytest.raises(ParameterSelectionError, match="exclude='nothing' matches no parameter"):
        create_magnitude_mask(folder, 0.5, exclude="nothing")
    with pytest.raises(SparsityError, match="fraction removed"):
        create_magnitude_mask(folder, 1.5)
    with pytest.raises(CheckpointError, match="neither a folder here nor"):
        create_magnitude_mask(str(tmp_path / "absent"), 0.5)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    for arguments in ({}, {"scope": "row"}):
        with pytest.raises(WeightsError, match=r"found in model\.layers\.3\.mlp\.up_proj\.weight \(1\)"):
            create_magnitude_mask(folder, 0.5, **arguments)


# --- Memory ---


MEMORY = (
    PEAK
    + """
import sys
from pathlib import Path
from lottery_tickets import create_magnitude_mask

create_magnitude_mask(sys.argv[1], [0.5, 0.9], allocation=sys.argv[2] or None)  # compiles, and starts threads
Path("/proc/self/clear_refs").write_text("5")
peaked = peak()
mask = create_magnitude_mask(sys.argv[1], [0.5, 0.9], allocation=sys.argv[2] or None)
print(peak() - peaked, 2 * mask[0].numel // 8)
"""
)


@pytest.mark.parametrize("allocation", ["", pytest.param("uniform", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_model(tmp_path: Path, allocation: str) -> None:
    """Mapped pages included: what was read is given back."""
    weights = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).bfloat16()
    tensors = {MODEL_OF_NAMES.format(index): weights.repeat(16).view(4096, 4096) for index in range(5)}
    save_file(tensors, tmp_path / "model.safetensors")  # 168 MB
    grown, masks = map(int, run_python(MEMORY, tmp_path, allocation).split())
    assert grown < masks + (48 << 20)


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path)
    with map_weights(folder) as weights:
        assert weights.folder == folder
        for name, tensor in loaded(folder).named_parameters():
            if name in weights.tensors:
                assert torch.equal(weights.tensors[name], tensor)
    assert len(weights.tensors) == 11 * 7 + 1  # still there: whoever holds a tensor holds its file
    assert all(tensor.sum().isfinite() for tensor in weights.tensors.values())
