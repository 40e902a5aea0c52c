"""Checkpoint folders on disk: what their safetensors shards hold, who they are, and a pruned copy of one.

Shards are read and written in blocks, so memory does not grow with the model. A pruned shard is a copy of the
dense one in which pruned weights are overwritten in place: header, order, alignment and metadata stay byte for
byte what they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from lottery_tickets._atomic import creating_folder
from lottery_tickets.errors import CheckpointError, MaskMismatchError
from lottery_tickets.masks import PackedBits, as_mask

_log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Data types whose zero is all bits zero, and their bytes a weight.
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_BLOCK = 1 << 20  # weights or bytes read at a time; a multiple of the kernel's 64 lanes
# The dense weights once more in another format would contradict the pruned ones, and pickles run code.
_OTHER_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".onnx_data"),
    *(".gguf", ".ot", ".bin.index.json"),
)


class PrunedCheckpoint(TypedDict):
    """What `prune_checkpoint` returns.

    Attributes:
        output: The new folder.
        shards: Its weight files, in order.
        tensors: Number of stored tensors that the mask speaks of; a tied tensor that is stored twice is two.
        weights_pruned: Number of weights of the mask that are zero now.
        left_out: Files of the old folder that hold weights in other formats or pickles, and were not copied.
    """

    output: str
    shards: list[str]
    tensors: int
    weights_pruned: int
    left_out: list[str]


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: its file, type and shape, and its bytes [start, stop) in that file."""

    file: str
    dtype: str
    shape: torch.Size
    start: int
    stop: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder of safetensors shards: key to place, for every tensor."""

    folder: Path
    tensors: Mapping[str, StoredTensor]

    @property
    def shards(self) -> list[str]:
        """Names of the weight files, sorted."""
        return sorted({tensor.file for tensor in self.tensors.values()})


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Places of all tensors of a checkpoint folder; headers are read and checked, weights are not.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names, as
            transformers saves them.

    Raises:
        CheckpointError: No safetensors weights (legacy pickles are refused), a shard that is missing or
            truncated, or an index that does not fit its shards.
        FileNotFoundError: No such folder.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from lottery_tickets.large_models import read_checkpoint
        >>> Path("tiny").mkdir()
        >>> save_file({"fc.weight": torch.ones(2, 3)}, "tiny/model.safetensors")
        >>> read_checkpoint("tiny").tensors["fc.weight"].shape
        torch.Size([2, 3])
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    # transformers prefers the single file where both are there.
    if (folder / SINGLE_FILE).is_file():
        return Checkpoint(folder, _stored_tensors(folder, SINGLE_FILE))
    if (folder / INDEX_FILE).is_file():
        return Checkpoint(folder, _indexed_tensors(folder))
    raise CheckpointError(_why_no_weights(folder))


def compute_weights_digest(folder: str | os.PathLike[str]) -> str:
    """The identity of a checkpoint's weights: sha256 over its tensors, in the order of their sorted keys.

    Each tensor adds its key, data type and shape as a line of JSON, then its bytes. How the tensors are spread
    over shards and what the metadata says do not count.

    Args:
        folder: A checkpoint folder; see `read_checkpoint`.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: A folder that `read_checkpoint` refuses.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from lottery_tickets.large_models import compute_weights_digest
        >>> Path("small").mkdir()
        >>> save_file({"w": torch.zeros(2)}, "small/model.safetensors")
        >>> compute_weights_digest("small")[:16]
        'c78fd766dac8e491'
    """
    checkpoint = read_checkpoint(folder)
    state = hashlib.sha256()
    for key in sorted(checkpoint.tensors):
        tensor = checkpoint.tensors[key]
        state.update(json.dumps([key, tensor.dtype, list(tensor.shape)]).encode() + b"\n")
        with (checkpoint.folder / tensor.file).open("rb") as file:
            for block in _blocks(file, tensor):
                state.update(block)
    return state.hexdigest()


def prune_checkpoint(
    folder: str | os.PathLike[str],
    mask: Mapping[str, torch.Tensor],
    output: str | os.PathLike[str],
    *,
    progress: bool = True,
) -> PrunedCheckpoint:
    """Write a copy of a checkpoint in which pruned weights are zero, shard by shard.

    The new folder keeps data types, sharding, index, metadata, configuration, tokenizer and other files, and
    loads to the bits of `apply_mask` on the loaded model. It appears whole or not at all. Extra memory: the
    packed mask and a block of 8 MiB.

    Args:
        folder: A checkpoint folder; see `read_checkpoint`.
        mask: A `Mask` or a plain dict of tensors. Its names are those of the model's parameters; a checkpoint
            saved with or without the prefix of the base model ("model.") is understood. A tied tensor that the
            checkpoint stores twice is masked in both places.
        output: The folder to make; it must not exist.
        progress: Show a bar on anything that takes over two seconds.

    Returns:
        A `PrunedCheckpoint`.

    Raises:
        CheckpointError: `output` exists, or a checkpoint that `read_checkpoint` refuses.
        MaskMismatchError: A tensor of the mask that the checkpoint does not store, in that shape, as floating
            point numbers.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> from safetensors.torch import load_file, save_file
        >>> from lottery_tickets.large_models import prune_checkpoint
        >>> Path("dense").mkdir()
        >>> save_file({"w": torch.tensor([3.0, 4.0])}, "dense/model.safetensors")
        >>> result = prune_checkpoint("dense", {"w": torch.tensor([False, True])}, "pruned")
        >>> load_file("pruned/model.safetensors")["w"], result["weights_pruned"]
        (tensor([0., 4.]), 1)
    """
    checkpoint = read_checkpoint(folder)
    ticket = as_mask(mask)
    keys = _keys_of(ticket.shapes, checkpoint)
    bits = {key: ticket.packed(name) for name, key in keys.items()}
    bits |= {twin: bits[key] for twin, key in _twins(checkpoint, bits).items()}
    others, left_out = _other_files(checkpoint)
    try:
        with creating_folder(output) as temporary:
            _copy(checkpoint.folder, temporary, others)
            for shard in tqdm(checkpoint.shards, "pruning shards", disable=not progress, delay=2):
                shutil.copyfile(checkpoint.folder / shard, temporary / shard)
                _prune_shard(temporary / shard, shard, checkpoint, bits)
                _log.info("pruned %s", shard)
    except FileExistsError as error:
        raise CheckpointError(f"{error}; nothing is overwritten: name another folder or remove it.") from error
    return PrunedCheckpoint(
        output=str(output),
        shards=checkpoint.shards,
        tensors=len(bits),
        weights_pruned=ticket.numel - ticket.kept,
        left_out=left_out,
    )


# --- Reading ---


def _stored_tensors(folder: Path, file: str) -> dict[str, StoredTensor]:
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{path}: the index names this shard and it is not there; get the checkpoint again.")
    try:
        with safe_open(path, framework="numpy"):  # checks lengths, offsets and types
            pass
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file, truncated or damaged ({error}); get the checkpoint again."
        ) from error
    with path.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header: dict[str, Any] = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    begin = 8 + length
    return {
        key: StoredTensor(
            file=file,
            dtype=entry["dtype"],
            shape=torch.Size(entry["shape"]),
            start=begin + entry["data_offsets"][0],
            stop=begin + entry["data_offsets"][1],
        )
        for key, entry in header.items()
    }


def _indexed_tensors(folder: Path) -> dict[str, StoredTensor]:
    path = folder / INDEX_FILE
    try:
        places = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not an index of shards ({error!r}); get the checkpoint again.") from error
    for file in files:
        # A name from untrusted text is written to later on, so it must stay inside the folder.
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path}: shard {file!r} is not the name of a file in this folder.")
    found = {file: _stored_tensors(folder, file) for file in files}
    tensors = {}
    for key, file in places.items():
        if key not in found[file]:
            raise CheckpointError(f"{path}: {key} should be in {file} and is not; get the checkpoint again.")
        tensors[key] = found[file][key]
    return tensors


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickles:
        return (
            f"{folder}: weights are pickles ({pickles[0]}), which are not read because they can run code. "
            'Convert them where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give a folder saved by save_pretrained."


def _blocks(file: BinaryIO, tensor: StoredTensor) -> Iterable[bytes]:
    file.seek(tensor.start)
    for start in range(tensor.start, tensor.stop, _BLOCK):
        yield file.read(min(_BLOCK, tensor.stop - start))


# --- Names of the mask, keys of the files ---


def _keys_of(shapes: Mapping[str, torch.Size], checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the mask to key in the files, every tensor checked."""
    keys = _located(list(shapes), checkpoint.tensors.keys())
    problems = []
    for name, shape in shapes.items():
        stored = checkpoint.tensors.get(keys.get(name, ""))
        if stored is None:
            problems.append(f"{name}: not stored under this name")
        elif stored.shape != shape:
            problems.append(f"{name}: mask {tuple(shape)}, stored {tuple(stored.shape)}")
        elif stored.dtype not in _WIDTHS:
            problems.append(f"{name}: stored as {stored.dtype}, which is not a floating point type")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise MaskMismatchError(
            f"The mask does not fit the files of {checkpoint.folder}: {listed}. If the mask was drawn from this "
            "checkpoint, the model fuses, quantizes or renames its weights while loading: load it, use "
            "apply_mask(model, mask), then model.save_pretrained(folder)."
        )
    return keys


def _located(names: list[str], keys: Iterable[str]) -> dict[str, str]:
    """Keys for as many names as can be found; those not stored as they are must share one base-model prefix."""
    stored = set(keys)
    located = {name: name for name in names if name in stored}
    strays = [name for name in names if name not in stored]
    if not strays:
        return located
    without = {name: name.partition(".")[2] for name in strays}
    spellings = [without] if len({name.partition(".")[0] for name in strays}) == 1 else []
    prefixes = sorted({key.partition(".")[0] for key in stored})
    spellings += [{name: f"{prefix}.{name}" for name in strays} for prefix in prefixes]
    for spelling in spellings:
        if stored.issuperset(spelling.values()) and not spelling.values() & located.keys():
            return located | spelling
    return located


def _twins(checkpoint: Checkpoint, masked: Mapping[str, PackedBits]) -> dict[str, str]:
    """Keys that hold a masked tensor once more, because it is tied; loading ties only what is still equal."""
    if not _ties_weights(checkpoint.folder):
        return {}
    twins = {}
    for key in masked:
        tensor = checkpoint.tensors[key]
        for other, candidate in checkpoint.tensors.items():
            alike = candidate.dtype == tensor.dtype and candidate.shape == tensor.shape
            if alike and len(tensor.shape) > 1 and other not in masked and _same_bytes(checkpoint, key, other):
                twins[other] = key
    return twins


def _ties_weights(folder: Path) -> bool:
    path = folder / "config.json"
    if not path.is_file():
        return False
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); get the checkpoint again.") from error
    # Ties are the default of older configurations, which do not mention them.
    return bool(config.get("tie_word_embeddings", True))


def _same_bytes(checkpoint: Checkpoint, key: str, other: str) -> bool:
    first, second = checkpoint.tensors[key], checkpoint.tensors[other]
    with (checkpoint.folder / first.file).open("rb") as a, (checkpoint.folder / second.file).open("rb") as b:
        return all(x == y for x, y in zip(_blocks(a, first), _blocks(b, second), strict=True))


# --- Writing ---


def _other_files(checkpoint: Checkpoint) -> tuple[list[Path], list[str]]:
    """Files to copy as they are, relative to the folder, and names of those left out."""
    copied, left_out = [], []
    for path in sorted(checkpoint.folder.rglob("*")):
        relative = path.relative_to(checkpoint.folder)
        hidden_folder = any(part.startswith(".") for part in relative.parts[:-1])
        if not path.is_file() or hidden_folder or str(relative) in checkpoint.shards:
            continue
        stale_index = relative.name == INDEX_FILE and SINGLE_FILE in checkpoint.shards
        if stale_index or path.name.endswith(_OTHER_WEIGHTS):
            left_out.append(str(relative))
        else:
            copied.append(relative)
    return copied, left_out


def _copy(source: Path, target: Path, files: Iterable[Path]) -> None:
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / file, target / file)


def _prune_shard(path: Path, shard: str, checkpoint: Checkpoint, bits: Mapping[str, PackedBits]) -> None:
    with path.open("r+b", buffering=0) as file:
        for key, packed in bits.items():
            if checkpoint.tensors[key].file == shard:
                _prune_tensor(file, checkpoint.tensors[key], packed)


def _prune_tensor(file: Any, tensor: StoredTensor, packed: PackedBits) -> None:
    from lottery_tickets import _kernels

    integer = _INTEGERS[_WIDTHS[tensor.dtype]]
    numel = tensor.shape.numel()
    for first in range(0, numel, _BLOCK):
        place = tensor.start + first * np.dtype(integer).itemsize
        count = min(_BLOCK, numel - first)
        file.seek(place)
        weights = np.fromfile(file, integer, count)
        _kernels.keep(weights, packed[first // 8 : (first + count + 7) // 8], weights)
        file.seek(place)
        weights.tofile(file)
