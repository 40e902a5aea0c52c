"""Checkpoints on disk: places and digest of weights, and pruned copies that load to the bits of apply_mask."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lottery_tickets
from lottery_tickets import Mask, apply_mask, create_magnitude_mask
from lottery_tickets.errors import CheckpointError, MaskMismatchError
from lottery_tickets.large_models import (
    compute_weights_digest,
    load_model,
    load_tokenizer,
    prune_checkpoint,
    read_checkpoint,
    resolve_model,
)

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tiny_llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=40,
        intermediate_size=50,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def save(model: LlamaForCausalLM, folder: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    return folder


def assert_same_bits(first: torch.nn.Module, second: torch.nn.Module) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        width = INTEGERS[tensor.element_size()]
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.view(width), theirs[name].view(width)), name


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


# --- A pruned copy ---


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loads_to_the_bits_of_apply_mask(tmp_path: Path, dtype: torch.dtype, tied: bool, shards: bool) -> None:
    folder = save(tiny_llama(tied=tied, dtype=dtype), tmp_path / "dense", shards=shards)
    model = load(folder)
    mask = create_magnitude_mask(model, 0.7)
    result = prune_checkpoint(folder, mask, tmp_path / "pruned")
    apply_mask(model, mask)
    pruned = load(tmp_path / "pruned")
    assert_same_bits(pruned, model)
    assert sum(int((pruned.get_parameter(name) == 0).sum()) for name in mask) == result["weights_pruned"]
    assert (len(result["shards"]) > 1) == shards


def test_keeps_shards_index_headers_and_other_files(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "dense", shards=True)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes").mkdir()
    (folder / "notes" / "card.md").write_text("card")
    result = prune_checkpoint(folder, Mask.ones_like(tiny_llama()), tmp_path / "same")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(result["shards"]) > 1
    assert sorted(p.relative_to(tmp_path / "same") for p in (tmp_path / "same").rglob("*") if p.is_file()) == files
    for file in files:  # a mask that keeps everything changes no byte of any file
        assert (tmp_path / "same" / file).read_bytes() == (folder / file).read_bytes(), file


def test_header_and_metadata_of_a_pruned_shard_are_untouched(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    weights = {"b": torch.tensor([-0.0, 5.0, float("nan")]), "a": torch.arange(1, 9.0).view(2, 4)}
    save_file(weights, tmp_path / "dense/model.safetensors", metadata={"format": "pt", "origin": "here"})
    prune_checkpoint(tmp_path / "dense", {"b": torch.tensor([1, 0, 0])}, tmp_path / "pruned")
    with safe_open(tmp_path / "pruned/model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "origin": "here"}
        assert torch.equal(file.get_tensor("a"), weights["a"])
        assert file.get_tensor("b").view(torch.int32).tolist() == [-(2**31), 0, 0]


def test_weights_beyond_one_block(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    weights = torch.randn((1 << 21) + 77, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_file({"w": weights}, tmp_path / "dense/model.safetensors")
    mask = create_magnitude_mask({"w": weights}, 0.5)
    prune_checkpoint(tmp_path / "dense", mask, tmp_path / "pruned")
    pruned = load_file(tmp_path / "pruned/model.safetensors")["w"]
    expected = torch.where(mask["w"], weights, torch.zeros((), dtype=torch.bfloat16))
    assert torch.equal(pruned.view(torch.int16), expected.view(torch.int16))


def test_a_header_of_odd_length(tmp_path: Path) -> None:
    # Files of other writers need not align their data; numpy views of it would then not be aligned either.
    weights = torch.arange(1.0, 131.0)
    header = json.dumps({"w": {"dtype": "F32", "shape": [130], "data_offsets": [0, 520]}}).encode()
    header += b" " * ((len(header) + 1) % 2)
    (tmp_path / "dense").mkdir()
    path = tmp_path / "dense/model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + weights.numpy().tobytes())
    assert read_checkpoint(tmp_path / "dense").tensors["w"].start % 4 != 0
    mask = create_magnitude_mask({"w": weights}, 0.5)
    prune_checkpoint(tmp_path / "dense", mask, tmp_path / "pruned")
    assert torch.equal(load_file(tmp_path / "pruned/model.safetensors")["w"], weights * mask["w"])


def test_a_tied_tensor_stored_twice_is_masked_twice(tmp_path: Path) -> None:
    folder = save(tiny_llama(tied=True), tmp_path / "dense")
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    model = load(folder)
    mask = create_magnitude_mask(model, 0.5, include="*.embed_tokens.weight")
    prune_checkpoint(folder, mask, tmp_path / "pruned")
    apply_mask(model, mask)
    pruned = load(tmp_path / "pruned")
    assert_same_bits(pruned, model)
    assert pruned.get_output_embeddings().weight is pruned.get_input_embeddings().weight


def test_equal_tensors_that_are_not_tied_stay_apart(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense/config.json").write_text('{"tie_word_embeddings": false}')
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, tmp_path / "dense/model.safetensors")
    prune_checkpoint(tmp_path / "dense", {"a": torch.zeros(2, 2)}, tmp_path / "pruned")
    assert load_file(tmp_path / "pruned/model.safetensors")["b"].sum() == 4


def test_saved_without_the_prefix_of_the_base_model(tmp_path: Path) -> None:
    tiny_llama(tied=True).model.save_pretrained(tmp_path / "dense")
    assert "layers.0.mlp.up_proj.weight" in read_checkpoint(tmp_path / "dense").tensors
    model = load(tmp_path / "dense")
    mask = create_magnitude_mask(model, 0.5)
    assert all(name.startswith("model.") for name in mask)
    prune_checkpoint(tmp_path / "dense", mask, tmp_path / "pruned")
    apply_mask(model, mask)
    assert_same_bits(load(tmp_path / "pruned"), model)


def test_a_mask_of_the_base_model_on_files_with_the_prefix(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = save(model, tmp_path / "dense")
    mask = create_magnitude_mask(model.model, 0.5)
    prune_checkpoint(folder, mask, tmp_path / "pruned")
    apply_mask(model.model, mask)
    assert_same_bits(load(tmp_path / "pruned"), model)


def test_smollm2(tmp_path: Path, smollm2_folder: Path, load_smollm2: Callable[..., LlamaForCausalLM]) -> None:
    model = load_smollm2(torch.bfloat16)
    mask = create_magnitude_mask(model, 0.5)
    prune_checkpoint(smollm2_folder, mask, tmp_path / "pruned")
    apply_mask(model, mask)
    assert_same_bits(load_model(tmp_path / "pruned"), model)
    assert load_tokenizer(tmp_path / "pruned")("lottery").input_ids


MEMORY = """
import re, sys, torch
from pathlib import Path
from lottery_tickets import Mask, _kernels
from lottery_tickets.large_models import prune_checkpoint, read_checkpoint

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

shape = read_checkpoint(sys.argv[1]).tensors["w"].shape
mask = Mask.ones_like({"w": torch.empty(shape, device="meta")})
before = peak()
prune_checkpoint(sys.argv[1], mask, sys.argv[2])
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_shard(tmp_path: Path) -> None:
    (tmp_path / "dense").mkdir()
    size = 200 << 20
    save_file({"w": torch.ones(size // 2, dtype=torch.bfloat16)}, tmp_path / "dense/model.safetensors")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "dense"), str(tmp_path / "pruned")]
    environment = {**os.environ, "PYTHONPATH": str(Path(lottery_tickets.__file__).parents[1])}
    extra = int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
    assert extra < 64 << 20  # the compiled kernel and a block; the shard has 200 MiB


# --- What is refused ---


def test_an_existing_output_is_left_alone(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = save(model, tmp_path / "dense")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(CheckpointError, match=r"taken exists already; nothing is overwritten: name another"):
        prune_checkpoint(folder, Mask.ones_like(model), tmp_path / "taken")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "taken"]
    assert (tmp_path / "taken/file").read_text() == "mine"


@pytest.mark.parametrize("shards", [False, True])
def test_a_truncated_shard(tmp_path: Path, shards: bool) -> None:
    folder = save(tiny_llama(), tmp_path / "dense", shards=shards)
    shard = folder / read_checkpoint(folder).shards[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(
        CheckpointError, match=rf"{shard.name}: not a whole safetensors file, truncated or damaged"
    ):
        read_checkpoint(folder)


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "dense", shards=True)
    (folder / read_checkpoint(folder).shards[1]).unlink()
    with pytest.raises(CheckpointError, match="the index names this shard and it is not there"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("nonsense", "not an index of shards"),
        ("[]", "not an index of shards"),
        ("{}", "not an index of shards"),
        ('{"weight_map": ["w"]}', "not an index of shards"),
        ('{"weight_map": {"w": "../model.safetensors"}}', "is not the name of a file in this folder"),
        ('{"weight_map": {"w": ".."}}', "is not the name of a file in this folder"),
        ('{"weight_map": {"w": ""}}', "is not the name of a file in this folder"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "'/etc/passwd' of w is not the name of a file"),
        (r'{"weight_map": {"w": "..\\a"}}', "is not the name of a file in this folder"),
        (r'{"weight_map": {"w": "a\u0000b"}}', "is not the name of a file in this folder"),
        (f'{{"weight_map": {{"w": "{"a" * 256}"}}}}', "is not the name of a file in this folder"),
        ('{"weight_map": {"w": 3}}', "is not the name of a file in this folder"),
        ('{"weight_map": {"w": "b.safetensors"}}', "the index names this shard and it is not there"),
        ('{"weight_map": {"w": "a.safetensors", "w": "a.safetensors"}}', "'w' stands in its JSON twice"),
        ('{"weight_map": {"other": "a.safetensors"}}', "other should be in a.safetensors and is not"),
        ('{"weight_map": {"v": "v.safetensors"}}', "w is in no shard, and in v.safetensors all the same"),
        (
            '{"weight_map": {"v": "v.safetensors", "w": "a.safetensors"}}',
            "w is in a.safetensors, and in v.safetensors all the same",
        ),
    ],
)
def test_a_bad_index(tmp_path: Path, index: str, message: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({"v": torch.ones(1), "w": torch.ones(1)}, tmp_path / "v.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "a.safetensors"])
def test_a_link_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({"w": torch.ones(1)}, folder / "a.safetensors")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"w": "a.safetensors"}}')
    if name == "model.safetensors":
        (folder / "a.safetensors").rename(folder / name)
    read_checkpoint(folder)
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(f"../{name}")
    with pytest.raises(CheckpointError, match=rf"{name}: a link to .*outside the checkpoint's folder; put a copy"):
        read_checkpoint(folder)


def test_the_links_of_a_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--me--net/snapshots/0a1b", tmp_path / "models--me--net/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    save_file({"w": torch.ones(1)}, blobs / "4e12bc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/4e12bc")
    assert list(read_checkpoint(snapshot).tensors) == ["w"]
    prune_checkpoint(snapshot, {"w": torch.zeros(1)}, tmp_path / "pruned")
    assert not load_file(tmp_path / "pruned/model.safetensors")["w"].any()
    assert not (tmp_path / "pruned/model.safetensors").is_symlink()
    (blobs / "4e12bc").rename(tmp_path / "models--me--net/elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../elsewhere")
    with pytest.raises(CheckpointError, match="outside the checkpoint's folder"):
        read_checkpoint(snapshot)


def test_what_is_no_regular_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for a writer that never comes
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        read_checkpoint(tmp_path)


def test_pickles_are_refused_with_the_command_that_converts(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pickles .*python -c .*save_pretrained"):
        read_checkpoint(tmp_path)


def test_that_command_converts(tmp_path: Path) -> None:
    model = tiny_llama(dtype=torch.bfloat16)
    folder = save(model, tmp_path / "old")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    command = str(caught.value).partition('python -c "')[2].rstrip('"')
    subprocess.run([sys.executable, "-c", command], check=True, capture_output=True)
    assert_same_bits(load(tmp_path / "old-safetensors"), model)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        read_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"absent": torch.ones(2)}, "absent: not stored under this name"),
        ({"w": torch.ones(3)}, r"w: mask \(3,\), stored \(2,\)"),
        ({"packed": torch.ones(2)}, "packed: stored as I32, which is not a floating point type"),
        ({f"x{i}": torch.ones(1) for i in range(7)}, "and 2 more"),
        ({"a.w": torch.ones(2), "w": torch.ones(2)}, r"a\.w: not stored"),  # both would be the same tensor
    ],
)
def test_a_mask_that_does_not_fit(tmp_path: Path, mask: dict[str, torch.Tensor], message: str) -> None:
    (tmp_path / "dense").mkdir()
    save_file(
        {"w": torch.ones(2), "packed": torch.ones(2, dtype=torch.int32)}, tmp_path / "dense/model.safetensors"
    )
    with pytest.raises(MaskMismatchError, match=message):
        prune_checkpoint(tmp_path / "dense", mask, tmp_path / "pruned")
    assert not (tmp_path / "pruned").exists()


def test_weights_in_other_formats_are_left_out_and_named(tmp_path: Path) -> None:
    model = tiny_llama()
    folder = save(model, tmp_path / "dense")
    for name in ("pytorch_model.bin", "consolidated.safetensors", "model.safetensors.index.json"):
        (folder / name).write_text("{}")
    result = prune_checkpoint(folder, Mask.ones_like(model), tmp_path / "pruned")
    assert result["left_out"] == ["consolidated.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    assert not any((tmp_path / "pruned" / name).exists() for name in result["left_out"])


# --- Who the weights are ---


def test_digest_is_that_of_its_definition(tmp_path: Path) -> None:
    folder = save(tiny_llama(dtype=torch.bfloat16), tmp_path / "dense", shards=True)
    tensors = {}
    for shard in folder.glob("*.safetensors"):
        tensors |= load_file(shard)
    state = hashlib.sha256()
    for key in sorted(tensors):
        state.update(json.dumps([key, "BF16", list(tensors[key].shape)]).encode() + b"\n")
        state.update(tensors[key].view(torch.int16).numpy().tobytes())
    assert compute_weights_digest(folder) == state.hexdigest()


def test_digest_does_not_depend_on_the_shards(tmp_path: Path) -> None:
    one = save(tiny_llama(), tmp_path / "one")
    many = save(tiny_llama(), tmp_path / "many", shards=True)
    assert compute_weights_digest(one) == compute_weights_digest(many)


def test_digest_depends_on_every_weight(tmp_path: Path) -> None:
    model = tiny_llama()
    before = compute_weights_digest(save(model, tmp_path / "before"))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[-1, -1] += 1e-3
    assert compute_weights_digest(save(model, tmp_path / "after")) != before


# --- Loading ---


def test_a_model_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("no/such-model", "./absent/folder", "a/b/c/d"):
        with pytest.raises(CheckpointError, match=r"neither a folder here nor .* hf download") as caught:
            resolve_model(name)
        assert "\n" not in str(caught.value)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save(tiny_llama(), tmp_path / "dense")
    stored = load_file(folder / "model.safetensors")
    del stored["model.layers.1.mlp.up_proj.weight"]
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors .* model\.layers\.1\.mlp\.up_proj\.weight for one"):
        load_model(folder)


@pytest.mark.parametrize(
    "config", [None, "{}", "nonsense", '{"model_type": "vit"}', '{"model_type": "llama", "head_dim": 9}']
)
def test_what_transformers_refuses_is_one_line(tmp_path: Path, config: str | None) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    for load_it in (load_model, load_tokenizer):
        with pytest.raises(CheckpointError, match="transformers cannot load") as caught:
            load_it(tmp_path)
        assert "\n" not in str(caught.value)
