"""A pruned copy of a checkpoint, shard by shard.

A pruned shard is the dense one in which pruned weights are zero: header, order, alignment and metadata stay byte
for byte what they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, TypedDict

import numpy as np
import torch
from tqdm import tqdm

from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models._checkpoints import (
    INDEX_FILE,
    SINGLE_FILE,
    Checkpoint,
    StoredTensor,
    check_inside,
    read_checkpoint,
)
from lottery_tickets.large_models._gathering import gathering
from lottery_tickets.large_models._names import FLOAT_BYTES, keys_of, twins_of
from lottery_tickets.masks import PackedBits, as_mask
from lottery_tickets.planning import Shapes, refuse_if_too_large

_log = logging.getLogger(__name__)

_INTEGERS = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
_BLOCK = 1 << 20  # weights or bytes copied at a time; a multiple of the kernel's 64 lanes
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


def prune_checkpoint(
    folder: str | os.PathLike[str],
    mask: Mapping[str, torch.Tensor],
    output: str | os.PathLike[str],
    *,
    progress: bool = True,
    check_memory: bool = True,
) -> PrunedCheckpoint:
    """Write a copy of a checkpoint in which pruned weights are zero, shard by shard.

    The new folder keeps data types, sharding, index, metadata, configuration, tokenizer and other files, and
    loads to the bits of `apply_mask` on the loaded model. Every weight is read once and written once; extra
    memory: the packed mask and a block of 8 MiB. The old folder is only read.

    The new folder appears whole or not at all. Until then its files gather in `.NAME.partial` beside it, each
    appearing there when it is whole; the same call after a failure or a kill takes those that are there and goes
    on. What gathered for another mask or other weights is thrown away.

    Args:
        folder: A checkpoint folder; see `read_checkpoint`.
        mask: A `Mask` or a plain dict of tensors. Its names are those of the model's parameters; a checkpoint
            saved with or without the prefix of the base model ("model.") is understood. A tied tensor that the
            checkpoint stores twice is masked in both places.
        output: The folder to make; it must not exist.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        A `PrunedCheckpoint`.

    Raises:
        CheckpointError: `output` exists, its disk has too little room, or a checkpoint that `read_checkpoint`
            refuses.
        MaskMismatchError: A tensor of the mask that the checkpoint does not store, in that shape, as floating
            point numbers.
        MemoryPlanError: More memory is needed than is free.

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
    keys = keys_of(ticket.shapes, checkpoint)
    widest = max((FLOAT_BYTES[checkpoint.tensors[key].dtype] for key in keys.values()), default=1)
    refuse_if_too_large("apply", Shapes.of_sizes(ticket.layer_numel(), widest), check=check_memory)
    bits = {key: ticket.packed(name) for name, key in keys.items()}
    bits |= {twin: bits[key] for twin, key in twins_of(checkpoint, bits).items()}
    others, left_out = _other_files(checkpoint)
    files = {name: (checkpoint.folder / name).stat() for name in (*others, *checkpoint.shards)}
    states = json.dumps([[name, state.st_size, state.st_mtime_ns] for name, state in files.items()])
    job = {"files": hashlib.sha256(states.encode()).hexdigest(), "mask": ticket.digest()}
    with gathering(Path(output), job, {name: state.st_size for name, state in files.items()}) as gathered:
        label = "pruning shards"
        for name in tqdm(gathered.missing(), label, disable=not progress, delay=2):
            with gathered.adding(name) as temporary:
                if name in others:
                    shutil.copyfile(checkpoint.folder / name, temporary)
                else:
                    _write_pruned(checkpoint, name, bits, temporary)
            _log.info("wrote %s", name)
    return PrunedCheckpoint(
        output=str(output),
        shards=checkpoint.shards,
        tensors=len(bits),
        weights_pruned=ticket.numel - ticket.kept,
        left_out=left_out,
    )


def copy_companions(folder: str | os.PathLike[str], output: str | os.PathLike[str]) -> list[str]:
    """Copy what stands beside the weights of a checkpoint, such as its tokenizer, where it is not there already.

    Args:
        folder: A checkpoint folder; see `read_checkpoint`.
        output: A folder with the weights and the configuration of another model.

    Returns:
        The files that were copied, relative to the folder.

    Raises:
        CheckpointError: A checkpoint that `read_checkpoint` refuses.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> from safetensors.torch import save_file
        >>> from lottery_tickets.large_models import copy_companions
        >>> Path("whole").mkdir(); Path("part").mkdir()
        >>> save_file({"w": torch.zeros(2)}, "whole/model.safetensors")
        >>> _ = Path("whole/vocab.txt").write_text("the")
        >>> copy_companions("whole", "part")
        ['vocab.txt']
    """
    checkpoint = read_checkpoint(folder)
    others, _ = _other_files(checkpoint)
    copied = [name for name in others if name != INDEX_FILE and not (Path(output) / name).exists()]
    for name in copied:
        (Path(output) / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, Path(output) / name)
    return copied


def _other_files(checkpoint: Checkpoint) -> tuple[list[str], list[str]]:
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
            check_inside(checkpoint.folder, path)
            copied.append(str(relative))
    return copied, left_out


def _write_pruned(checkpoint: Checkpoint, shard: str, bits: Mapping[str, PackedBits], target: Path) -> None:
    stored = [(tensor, key) for key, tensor in checkpoint.tensors.items() if tensor.file == shard]
    stored.sort(key=lambda item: (item[0].start, item[0].stop))
    with (checkpoint.folder / shard).open("rb") as source, target.open("wb", buffering=0) as copy:
        _copy(source, copy, min(tensor.start for tensor, _ in stored))
        for tensor, key in stored:
            if key in bits:
                _copy_pruned(source, copy, tensor, bits[key])
            else:
                _copy(source, copy, tensor.stop - tensor.start)


def _copy(source: BinaryIO, copy: BinaryIO, size: int) -> None:
    buffer = np.empty(min(size, _BLOCK), np.uint8)
    for start in range(0, size, _BLOCK):
        block = buffer[: size - start]
        _fill(source, block)
        block.tofile(copy)


def _copy_pruned(source: BinaryIO, copy: BinaryIO, tensor: StoredTensor, packed: PackedBits) -> None:
    from lottery_tickets import _kernels

    numel = tensor.shape.numel()
    buffer = np.empty(min(numel, _BLOCK), _INTEGERS[FLOAT_BYTES[tensor.dtype]])
    for start in range(0, numel, _BLOCK):
        weights = buffer[: numel - start]
        _fill(source, weights)
        _kernels.keep(weights, packed[start // 8 : (start + weights.size + 7) // 8], weights)
        weights.tofile(copy)


def _fill(source: BinaryIO, block: np.typing.NDArray[np.generic]) -> None:
    """Read the next bytes of a file into memory that is there already."""
    if source.readinto(block.data.cast("B")) != block.nbytes:  # type: ignore[attr-defined]
        raise CheckpointError(f"{source.name}: cut short while it was read; get the checkpoint again.")
