"""Checkpoints of torch.distributed.checkpoint, read without a process group.

Their `.metadata` is a pickle, and a pickle can run whatever its maker likes. Here it may only make the classes
that such metadata is made of; what it then says is checked before any file is opened. Tensors are put together one
at a time, however their pieces were spread over ranks, and laid down in a temporary folder of safetensors, from
which they are mapped: memory for one tensor, and room on the disk for the weights once more.
"""

from __future__ import annotations

import json
import math
import pickle
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors.torch import save_file

from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models._checkpoints import CONFIG_FILE, INDEX_FILE, check_inside, is_file_name

_METADATA_FILE = ".metadata"
# First words of the keys of what is saved beside weights.
_NOT_WEIGHTS = ("optim", "optimizer", "optimizers")

_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties"),
        *("MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
}


def is_distributed_checkpoint(folder: Path) -> bool:
    """Whether this is a folder written by `torch.distributed.checkpoint.save`."""
    return (folder / _METADATA_FILE).is_file()


@contextmanager
def as_safetensors(folder: Path) -> Iterator[Path]:
    """A temporary checkpoint folder with the weights of a distributed checkpoint, for the time of a block.

    Weights are the floating-point tensors whose key does not begin with "optim.", "optimizer." or "optimizers.".
    Names are the keys that they were saved under; of several rank's pieces each tensor is made whole.

    Args:
        folder: Written by `torch.distributed.checkpoint.save`, with the `config.json` of its model or without.

    Raises:
        CheckpointError: Metadata that makes anything but metadata, that contradicts itself or leads out of the
            folder; files that are missing or damaged; no room for a copy.
    """
    metadata = _read_metadata(folder)
    weights = {
        key: stored
        for key, stored in metadata.state_dict_metadata.items()
        if _is_weight(key, stored) and _check_pieces(folder, key, stored)
    }
    if not weights:
        raise CheckpointError(f"{folder}: no floating-point tensors are in this distributed checkpoint.")
    _check_files(folder, metadata.storage_data)
    with tempfile.TemporaryDirectory(prefix="lottery-tickets-") as made:
        copy = Path(made)
        if (folder / CONFIG_FILE).is_file():
            shutil.copy(check_inside(folder, folder / CONFIG_FILE), copy / CONFIG_FILE)
        try:
            _lay_down(folder, metadata, weights, copy)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: cannot be copied to {copy} ({error}). Its weights need room there once; the "
                "environment variable TMPDIR chooses another place."
            ) from error
        yield copy


def _lay_down(folder: Path, metadata: Any, weights: Mapping[str, Any], copy: Path) -> None:
    """Write every tensor into a file of its own."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    class Reader(FileSystemReader):
        """Reads the files by the metadata that has been checked."""

        def read_metadata(self, *_args: Any, **_kwargs: Any) -> Any:
            return metadata

    reader = Reader(folder)
    places = {}
    for number, (key, stored) in enumerate(weights.items()):
        tensor = torch.empty(stored.size, dtype=stored.properties.dtype)
        _load(folder, key, tensor, reader)
        places[key] = f"model-{number:05d}.safetensors"
        save_file({key: tensor}, copy / places[key])
    (copy / INDEX_FILE).write_text(json.dumps({"weight_map": places}))


def _load(folder: Path, key: str, tensor: torch.Tensor, reader: Any) -> None:
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            load({key: tensor}, storage_reader=reader, no_dist=True)
    except CheckpointException as error:  # wraps what a damaged file happens to run into
        (reason, _), *_ = error.failures.values()
        first = str(reason).strip().partition("\n")[0]
        raise CheckpointError(
            f"{folder}: {key} cannot be read from its files ({first}); get the checkpoint again."
        ) from error


def _is_weight(key: object, stored: Any) -> bool:
    dtype = getattr(getattr(stored, "properties", None), "dtype", None)
    floating = isinstance(dtype, torch.dtype) and dtype.is_floating_point
    return floating and isinstance(key, str) and key.partition(".")[0] not in _NOT_WEIGHTS


# --- Metadata, from strangers ---


class _MetadataUnpickler(pickle.Unpickler):
    """Makes what checkpoint metadata is made of, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module in (
            "pathlib",
            "pathlib._local",
        ):  # the latter in Python 3.13; of paths, only what they are called
            return PurePosixPath
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of checkpoint metadata")


def _read_metadata(folder: Path) -> Any:
    path = folder / _METADATA_FILE
    try:
        with check_inside(folder, path).open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
        entries, storage = metadata.state_dict_metadata, metadata.storage_data
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises whatever it happens to run into
        raise CheckpointError(f"{path}: not the metadata of a distributed checkpoint ({error}).") from error
    if not isinstance(entries, dict) or not isinstance(storage, dict):
        raise CheckpointError(f"{path}: not the metadata of a distributed checkpoint (no tables of tensors).")
    return metadata


def _check_pieces(folder: Path, key: str, stored: Any) -> bool:
    """True if the pieces make up the tensor.

    Raises:
        CheckpointError: They do not.
    """
    try:
        size = tuple(stored.size)
        pieces = [(tuple(piece.offsets), tuple(piece.sizes)) for piece in stored.chunks]
        fits = all(_lies_in(size, *piece) for piece in pieces)
        filled = sum(math.prod(sizes) for _, sizes in pieces)
    except (AttributeError, TypeError) as error:
        raise CheckpointError(f"{folder / _METADATA_FILE}: {key} is no tensor in pieces ({error}).") from error
    if not fits or filled != math.prod(size) or len(set(pieces)) != len(pieces):
        raise CheckpointError(
            f"{folder / _METADATA_FILE}: the {len(pieces)} pieces of {key} do not make up a tensor of {size}; get "
            "the checkpoint again."
        )
    return True


def _lies_in(size: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...]) -> bool:
    return len(size) == len(offsets) == len(sizes) and all(
        offset >= 0 and length >= 0 and offset + length <= whole
        for whole, offset, length in zip(size, offsets, sizes, strict=True)
    )


def _check_files(folder: Path, storage: Mapping[Any, Any]) -> None:
    """Refuse places of pieces that are not in files of this folder."""
    lengths: dict[str, int] = {}
    for place in storage.values():
        name = getattr(place, "relative_path", None)
        if not isinstance(name, str) or not is_file_name(name):
            raise CheckpointError(f"{folder / _METADATA_FILE}: {name!r} is not the name of a file in this folder.")
        if name not in lengths:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: the metadata names this file and it is not there.")
            lengths[name] = check_inside(folder, folder / name).stat().st_size
        start, length = getattr(place, "offset", None), getattr(place, "length", None)
        if not (type(start) is type(length) is int) or not 0 <= start <= start + length <= lengths[name]:
            raise CheckpointError(f"{folder / name}: cut short, or damaged; get the checkpoint again.")
