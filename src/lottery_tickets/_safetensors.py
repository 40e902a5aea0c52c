"""Headers of safetensors files, checked before anything in them is believed.

A file is the length of its header (eight bytes, little-endian), the header (JSON, name to data type, shape and
place, and text under `__metadata__`), and the data. Headers come from strangers: nothing is read or allocated by a
number in one that has not been compared with the file's own size. JSON takes many times its text as objects, so a
header has to be small beside its file: that keeps reading within twice the file and 64 MiB, whatever is in it.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Bits of one element.
WIDTHS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
METADATA = "__metadata__"

# What the safetensors library reads at most, too.
_LONGEST_HEADER = 100_000_000
# Bytes of objects that come from a byte of JSON at most, as the worst texts have been seen to take, and what may
# be taken by a file so small that its header is most of it.
_OBJECTS, _ALLOWED = 40, 64 << 20
# What torch can count, and what it can lay out.
MOST_ELEMENTS = (1 << 63) - 1
MOST_DIMENSIONS = 64
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = 8
_FIELDS = {"dtype", "shape", "data_offsets"}


class DamagedFileError(ValueError):
    """What is wrong with a file; its readers say it in an error of their own."""


class Entry(NamedTuple):
    """Where one tensor lies: its data type, its shape, and its bytes [start, stop) in the file."""

    dtype: str
    shape: torch.Size
    start: int
    stop: int


class Header(NamedTuple):
    """All tensors of a file, by name, and its metadata."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str]) -> Header:
    """The header of a file, every number of it checked; the data is not read.

    The data must be covered by the tensors, without gaps and overlaps, as the format asks.

    Raises:
        DamagedFileError: Not a whole safetensors file; says why, and of which tensor.
        OSError: The file cannot be opened.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        if len(prefix) < 8:
            raise DamagedFileError(f"{size} bytes, too short for a header")
        length = int.from_bytes(prefix, "little")
        if length > min(size - 8, _LONGEST_HEADER):
            raise DamagedFileError(f"header too large: {length} bytes in a file of {size}")
        check_text_size(length, size)
        text = file.read(length)
    return _parsed(text, 8 + length, size)


def check_text_size(length: int, size: int) -> None:
    """Refuse JSON that as objects could take more than twice the bytes that it speaks of, and 64 MiB.

    Raises:
        DamagedFileError: It could.
    """
    if _OBJECTS * length > 2 * size + _ALLOWED:
        raise DamagedFileError(f"{length} bytes of JSON for {size} bytes: too many to be what they should")


def parse_json(text: bytes | str) -> Any:
    """JSON as the format knows it: no key twice, no NaN, text that can be written as UTF-8.

    Raises:
        DamagedFileError: Anything else, however deep or long.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except DamagedFileError:
        raise
    except (ValueError, RecursionError) as error:  # no JSON, numbers of thousands of digits, endless nesting
        raise DamagedFileError(f"not JSON: {type(error).__name__}, {error}") from error


def is_shape(sizes: Any) -> bool:
    """Whether this came from JSON as the sizes of a tensor that can be."""
    # The number of dimensions first: a product of a million factors takes minutes.
    return (
        _are_counts(sizes)
        and len(sizes) <= MOST_DIMENSIONS
        and math.prod(size or 1 for size in sizes) <= MOST_ELEMENTS
    )


def shorten(thing: object) -> str:
    """What to show of something that a stranger wrote."""
    return _SHORT.repr(thing)


def _parsed(text: bytes, begin: int, size: int) -> Header:
    if not text.startswith(b"{"):
        raise DamagedFileError("its header is not a JSON object")
    entries = parse_json(text)
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DamagedFileError(f"{METADATA} is not a mapping from text to text")
    tensors = {name: _entry(name, entry, begin, size) for name, entry in entries.items()}
    _check_cover(tensors, begin, size)
    return Header(tensors, metadata)


def _entry(name: str, entry: Any, begin: int, size: int) -> Entry:
    label = shorten(name)
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        raise DamagedFileError(f"{label} is not described by {', '.join(sorted(_FIELDS))}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in WIDTHS:
        raise DamagedFileError(f"{label} has the unknown data type {shorten(dtype)}")
    if not is_shape(shape):
        raise DamagedFileError(f"{label} has the shape {shorten(shape)}, which no tensor has")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - begin:
        raise DamagedFileError(f"{label} lies at {shorten(offsets)} of {size - begin} bytes of data; truncated?")
    start, stop = offsets
    if math.prod(shape) * WIDTHS[dtype] != 8 * (stop - start):
        raise DamagedFileError(f"{label} is {dtype} {shorten(shape)} in {stop - start} bytes, which does not fit")
    return Entry(dtype, torch.Size(shape), begin + start, begin + stop)


def _check_cover(tensors: dict[str, Entry], begin: int, size: int) -> None:
    reached, before = begin, "the header"
    for name, entry in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if entry.start != reached:
            what = "overlaps" if entry.start < reached else "leaves a gap behind"
            raise DamagedFileError(f"{shorten(name)} {what} {before}")
        reached, before = entry.stop, shorten(name)
    if reached != size:
        raise DamagedFileError(f"{size - reached} bytes behind {before} belong to no tensor")


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(
        type(number) is int and 0 <= number <= MOST_ELEMENTS for number in numbers
    )


def _without_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DamagedFileError(f"{shorten(key)} stands in its JSON twice")
        if not _is_text(key) or (isinstance(value, str) and not _is_text(value)):
            raise DamagedFileError(f"{shorten(key)} is not UTF-8 text")
        found[key] = value
    return found


def _is_text(text: str) -> bool:
    """Whether there is no half of a surrogate pair in it, which JSON can spell and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(constant: str) -> None:
    raise DamagedFileError(f"{constant} is not JSON")
