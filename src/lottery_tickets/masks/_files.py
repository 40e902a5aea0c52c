"""Ticket files: one safetensors file, the packed bits of each tensor and what to know about them.

Layout, version 1: one uint8 tensor per parameter name, `ceil(numel / 8)` bytes, the first weight in the lowest
bit. The header's metadata holds the keys of `_RESERVED` and whatever the caller added.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors.numpy import save_file

from lottery_tickets._atomic import replacing
from lottery_tickets._safetensors import DamagedFileError, Entry, is_shape, parse_json, read_header, shorten
from lottery_tickets.errors import MaskFileError
from lottery_tickets.masks import _bits
from lottery_tickets.masks._bits import PackedBits

_log = logging.getLogger(__name__)

FORMAT = "lottery_tickets.mask"
FORMAT_VERSION = "1"

_METADATA = "__metadata__"
_RESERVED = ("format", "format_version", "shapes", "digest", "numel", "kept", "sparsity", "library_version")


def write(
    path: str | os.PathLike[str],
    packed: Mapping[str, PackedBits],
    shapes: Mapping[str, torch.Size],
    *,
    metadata: Mapping[str, str],
    digest: str,
    kept: int,
) -> None:
    """Write a ticket file under a temporary name and rename it."""
    for key, value in metadata.items():
        if key in _RESERVED:
            raise MaskFileError(f"Metadata key {key!r} belongs to the format; choose another name for yours.")
        for part, text in (("keys", key), ("values", value)):
            if not isinstance(text, str):
                raise MaskFileError(f"Metadata {key!r}: {part} are text, got {type(text).__name__}; use str().")
    if _METADATA in shapes:
        raise MaskFileError(f"{_METADATA}: safetensors keeps this name for itself; rename the tensor.")
    numel = sum(shape.numel() for shape in shapes.values())
    header = {
        **metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "shapes": json.dumps({name: list(shape) for name, shape in shapes.items()}, separators=(",", ":")),
        "digest": digest,
        "numel": str(numel),
        "kept": str(kept),
        "sparsity": repr((numel - kept) / numel if numel else 0.0),
        "library_version": version("lottery-tickets"),
    }
    with replacing(path) as temporary:
        save_file(dict(packed), temporary, metadata=header)
        _sort_metadata(temporary)
    _log.info("wrote %s: sparsity %s, digest %s", path, header["sparsity"], digest)


def _sort_metadata(path: Path) -> None:
    """Put the metadata, which safetensors writes in random order, in one order: equal tickets, equal files."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header[_METADATA] = dict(sorted(header[_METADATA].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, path
        file.seek(8)
        file.write(text.ljust(length))


def read(
    path: str | os.PathLike[str],
) -> tuple[dict[str, PackedBits], dict[str, torch.Size], dict[str, str], str]:
    """Packed bits, shapes, the caller's metadata and the digest the file claims; bytes checked against shapes."""
    if Path(path).is_dir():
        raise MaskFileError(f"{path}: a folder, not a ticket file; give the path of the .safetensors file in it.")
    try:
        entries, metadata = read_header(path)
    except DamagedFileError as error:
        raise MaskFileError(
            f"{path}: not a whole safetensors file, truncated or damaged ({error}); get the ticket again."
        ) from error
    header = _checked_header(path, metadata)
    shapes = _parsed_shapes(path, header["shapes"])
    _check_names(path, set(entries), set(shapes))
    with Path(path).open("rb") as file:
        packed = {name: _read_bits(path, file, name, entries[name], shapes[name].numel()) for name in shapes}
    own = {key: value for key, value in header.items() if key not in _RESERVED}
    return packed, shapes, own, header["digest"]


def check_digest(path: str | os.PathLike[str], *, expected: str, found: str) -> None:
    """Refuse a file whose bits are not those it was written with."""
    if expected != found:
        raise MaskFileError(
            f"{path}: wrong digest: the file says {expected}, its bits give {found}; it was changed or damaged."
        )
    _log.info("read %s: digest %s", path, found)


def _checked_header(path: str | os.PathLike[str], header: Mapping[str, str] | None) -> dict[str, str]:
    if not header:
        raise MaskFileError(f"{path}: no metadata, so this is not a ticket; tickets are written by Mask.save.")
    if header.get("format") != FORMAT:
        raise MaskFileError(f"{path}: format is {header.get('format')!r}, a ticket says {FORMAT!r}.")
    if header.get("format_version") != FORMAT_VERSION:
        raise MaskFileError(
            f"{path}: format version {header.get('format_version')!r} is unknown here, this library reads "
            f"{FORMAT_VERSION!r}; update lottery-tickets."
        )
    missing = [key for key in _RESERVED if key not in header]
    if missing:
        raise MaskFileError(f"{path}: missing metadata: {', '.join(missing)}.")
    return dict(header)


def _parsed_shapes(path: str | os.PathLike[str], text: str) -> dict[str, torch.Size]:
    try:
        shapes = parse_json(text)
    except DamagedFileError as error:
        raise MaskFileError(f"{path}: metadata 'shapes' is not readable JSON ({error}).") from error
    if not isinstance(shapes, dict):
        raise MaskFileError(f"{path}: metadata 'shapes' must map names to lists of sizes.")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
            raise MaskFileError(f"{path}: {name}: shape {shorten(shape)} is not a list of non-negative integers.")
        # Products beyond 64 bits would wrap around, and a huge tensor pass for a small one.
        if not is_shape(shape):
            raise MaskFileError(f"{path}: {name}: shape {shorten(shape)} holds more weights than a tensor can.")
    return {name: torch.Size(shape) for name, shape in shapes.items()}


def _check_names(path: str | os.PathLike[str], tensors: set[str], shapes: set[str]) -> None:
    if tensors != shapes:
        raise MaskFileError(f"{path}: bits without a shape or a shape without bits: {sorted(tensors ^ shapes)}.")


def _read_bits(path: str | os.PathLike[str], file: BinaryIO, name: str, entry: Entry, numel: int) -> PackedBits:
    # The header's own shape is checked before any byte is read: sizes come from untrusted text.
    size = _bits.packed_size(numel)
    if entry.dtype != "U8" or list(entry.shape) != [size]:
        raise MaskFileError(
            f"{path}: {name}: its shape takes {size} bytes of packed bits, the file holds "
            f"{entry.dtype} {list(entry.shape)}."
        )
    file.seek(entry.start)
    bits: PackedBits = np.fromfile(file, np.uint8, size)
    if bits.size != size:
        raise MaskFileError(f"{path}: {name}: cut short while it was read; get the ticket again.")
    if _bits.has_bits_beyond(bits, numel):
        raise MaskFileError(f"{path}: {name}: bits are set beyond the last of its {numel} weights.")
    return bits
