"""Checkpoint folders on disk: which safetensors shards hold which tensors, and who the weights are.

Folders come from strangers. Headers are checked before a number in them is used, and no file outside the folder is
read, with one exception: in the cache of the Hugging Face hub a snapshot's files are links to the blobs beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lottery_tickets._safetensors import DamagedFileError, check_text_size, parse_json, read_header, shorten
from lottery_tickets.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"

_BLOCK = 1 << 20
# What a name in a folder may take, in bytes, on every usual file system.
_LONGEST_NAME = 255


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

    def config(self) -> dict[str, Any] | None:
        """What `config.json` says; None where there is none.

        Raises:
            CheckpointError: It is not a JSON object.
        """
        path = self.folder / CONFIG_FILE
        if not path.is_file():
            return None
        try:
            config = json.loads(check_inside(self.folder, path).read_bytes())
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: not JSON ({error}); get the checkpoint again.") from error
        if not isinstance(config, dict):
            raise CheckpointError(f"{path}: not a JSON object; get the checkpoint again.")
        return config


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Places of all tensors of a checkpoint folder; headers are read and checked, weights are not.

    Args:
        folder: Holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names, as
            transformers saves them.

    Raises:
        CheckpointError: No safetensors weights (legacy pickles are refused), a shard that is missing, truncated
            or outside the folder, a header that contradicts itself or the file's size, a tensor of an unknown
            data type or stored twice, or an index that does not fit its shards.
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
        for block in stored_blocks(checkpoint, tensor):
            state.update(block)
    return state.hexdigest()


def stored_blocks(checkpoint: Checkpoint, tensor: StoredTensor) -> Iterator[bytes]:
    """The bytes of a tensor, a block at a time.

    Raises:
        CheckpointError: The file ends before the tensor does: it was changed after its header was read.
    """
    path = checkpoint.folder / tensor.file
    with path.open("rb") as file:
        file.seek(tensor.start)
        for start in range(tensor.start, tensor.stop, _BLOCK):
            block = file.read(min(_BLOCK, tensor.stop - start))
            if len(block) != min(_BLOCK, tensor.stop - start):
                raise CheckpointError(f"{path}: cut short while it was read; get the checkpoint again.")
            yield block


def check_inside(folder: Path, path: Path) -> Path:
    """The path, if the file it leads to lies in the folder, or in the blobs that a hub cache keeps beside it.

    Raises:
        CheckpointError: A link to somewhere else.
    """
    real, home = path.resolve(), folder.resolve()
    # .../models--owner--name/snapshots/REVISION holds links to .../models--owner--name/blobs.
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    if not any(real.is_relative_to(place) for place in homes):
        raise CheckpointError(
            f"{path}: a link to {real}, outside the checkpoint's folder; put a copy of the file in its place."
        )
    return path


# --- Reading ---


def _stored_tensors(folder: Path, file: str) -> dict[str, StoredTensor]:
    path = folder / file
    if not path.is_file():
        raise CheckpointError(f"{path}: the index names this shard and it is not there; get the checkpoint again.")
    try:
        header = read_header(check_inside(folder, path))
    except DamagedFileError as error:
        raise CheckpointError(
            f"{path}: not a whole safetensors file, truncated or damaged ({error}); get the checkpoint again."
        ) from error
    return {key: StoredTensor(file, *entry) for key, entry in header.tensors.items()}


def _indexed_tensors(folder: Path) -> dict[str, StoredTensor]:
    path = folder / INDEX_FILE
    places = _weight_map(folder, path)
    found = {file: _stored_tensors(folder, file) for file in sorted(set(places.values()))}
    for key, file in places.items():
        if key not in found[file]:
            raise CheckpointError(f"{path}: {key} should be in {file} and is not; get the checkpoint again.")
    for file, tensors in found.items():
        for key in tensors:
            if places.get(key) != file:
                told = f"{key} is in {places[key]}" if key in places else f"{key} is in no shard"
                raise CheckpointError(f"{path}: {told}, and in {file} all the same; get the checkpoint again.")
    return {key: found[file][key] for key, file in places.items()}


def _weight_map(folder: Path, path: Path) -> dict[str, str]:
    try:
        shards = sum(shard.stat().st_size for shard in folder.glob("*.safetensors"))
        size = check_inside(folder, path).stat().st_size
        check_text_size(size, size + shards)
        index = parse_json(path.read_bytes())
    except DamagedFileError as error:
        raise CheckpointError(f"{path}: not an index of shards ({error}); get the checkpoint again.") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise CheckpointError(f"{path}: not an index of shards (no weight_map); get the checkpoint again.")
    for key, file in places.items():
        if not isinstance(file, str) or not is_file_name(file):
            raise CheckpointError(
                f"{path}: shard {shorten(file)} of {key} is not the name of a file in this folder."
            )
    return places


def is_file_name(file: str) -> bool:
    """Whether this names something in a folder, and cannot lead out of it."""
    separated = any(character in file for character in ("/", "\\", "\0"))
    return not separated and file not in ("", ".", "..") and len(file.encode()) <= _LONGEST_NAME


def _why_no_weights(folder: Path) -> str:
    pickles = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith("pytorch_model"))
    if pickles:
        return (
            f"{folder}: weights are pickles ({pickles[0]}), which are not read because they can run code. "
            'Convert them where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safetensors')\""
        )
    return f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} is there; give a folder saved by save_pretrained."
