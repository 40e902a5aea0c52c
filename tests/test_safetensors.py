"""Headers of safetensors files: what is accepted is what the format says, and nothing else is believed."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lottery_tickets._safetensors import DamagedFileError, read_header


def entry(dtype: str = "U8", shape: Any = (2,), offsets: Any = (0, 2)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(3, 4, dtype=torch.bfloat16),
        "\u00e9": torch.ones(5, dtype=torch.float64),
        "scalar": torch.ones((), dtype=torch.bool),
        "empty": torch.ones(0, 7, dtype=torch.float8_e4m3fn),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    path = tmp_path / "file"
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert {name: found.shape for name, found in header.tensors.items()} == {
        name: tensor.shape for name, tensor in tensors.items()
    }
    content = path.read_bytes()
    for name, found in header.tensors.items():
        stored = torch.frombuffer(bytearray(content[found.start : found.stop]) or bytearray(1), dtype=torch.uint8)
        assert found.stop - found.start == tensors[name].nbytes
        if tensors[name].numel():
            assert torch.equal(stored, tensors[name].reshape(-1).view(torch.uint8)), name


REFUSED = {
    "empty file": (b"", "0 bytes, too short for a header"),
    "half a length": (b"\x10\0\0", "3 bytes, too short"),
    "longer than the file": (b"\x10" + bytes(7) + b"{}", "header too large: 16 bytes in a file of 10"),
    "longer than memory": (b"\xff" * 8 + b"{}", "header too large"),
    "nothing": (file_of(b"", b""), "not a JSON object"),
    "no object": (file_of(b"[]", b""), "not a JSON object"),
    "no JSON": (file_of(b"{w", b""), "not JSON"),
    "no UTF-8": (file_of(b'{"\xff": 1}', b""), "not JSON: UnicodeDecodeError"),
    "half a pair": (file_of(rb'{"\ud800": {}}', b""), "is not UTF-8 text"),
    "nested without end": (file_of(b'{"w":' + b"[" * 100_000, b""), "not JSON: RecursionError"),
    "endless digits": (file_of(b'{"w":' + b"9" * 100_000 + b"}", b""), "not JSON: ValueError"),
    "no number": (file_of(b'{"w": NaN}', b""), "NaN is not JSON"),
    "a name twice": (
        file_of(b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{}}', b""),
        "'w' stands in its JSON twice",
    ),
    "a field twice": (file_of(b'{"w":{"dtype":"U8","dtype":"I8"}}', b""), "'dtype' stands in its JSON twice"),
    "metadata of numbers": (file_of({"__metadata__": {"a": 1}}, b""), "not a mapping from text to text"),
    "no entry": (file_of({"w": 3}, b""), "'w' is not described by data_offsets, dtype, shape"),
    "a field missing": (file_of({"w": {"dtype": "U8", "shape": []}}, b""), "'w' is not described by"),
    "a field too many": (file_of({"w": {**entry(), "more": 1}}, bytes(2)), "'w' is not described by"),
    "unknown type": (file_of({"w": entry("INT4")}, bytes(2)), "'w' has the unknown data type 'INT4'"),
    "type of no text": (file_of({"w": entry(["U8"])}, bytes(2)), "'w' has the unknown data type"),
    "shape of fractions": (file_of({"w": entry(shape=[2.0])}, bytes(2)), r"'w' has the shape \[2\.0\]"),
    "shape of truths": (file_of({"w": entry(shape=[True, 2])}, bytes(2)), "'w' has the shape"),
    "shape negative": (file_of({"w": entry(shape=[-1, -2])}, bytes(2)), "'w' has the shape"),
    "shape that wraps around": (file_of({"w": entry(shape=[2**32, 2**32])}, bytes(2)), "'w' has the shape"),
    "a size beyond 64 bits": (file_of({"w": entry(shape=[0, 2**64])}, bytes(2)), "'w' has the shape"),
    "dimensions without end": (file_of({"w": entry(shape=[2] * 100_000)}, bytes(2)), "'w' has the shape"),
    "shape of no list": (file_of({"w": entry(shape={"0": 2})}, bytes(2)), "'w' has the shape"),
    "one offset": (file_of({"w": entry(offsets=[2])}, bytes(2)), r"'w' lies at \[2\] of 2 bytes"),
    "backwards": (file_of({"w": entry(offsets=[2, 0])}, bytes(2)), "'w' lies at"),
    "before the data": (file_of({"w": entry(offsets=[-2, 0])}, bytes(2)), "'w' lies at"),
    "behind the end": (file_of({"w": entry(offsets=[1, 3])}, bytes(2)), "'w' lies at .* truncated"),
    "far behind the end": (file_of({"w": entry(offsets=[0, 2**63])}, bytes(2)), "'w' lies at"),
    "too many bytes": (file_of({"w": entry(offsets=[0, 3])}, bytes(3)), r"'w' is U8 \[2\] in 3 bytes"),
    "half a byte": (file_of({"w": entry("F4", [3], [0, 1])}, bytes(1)), r"'w' is F4 \[3\] in 1 bytes"),
    "overlap": (
        file_of({"a": entry(), "b": entry(offsets=[1, 3])}, bytes(3)),
        "'b' overlaps 'a'",
    ),
    "the same bytes": (file_of({"a": entry(), "b": entry()}, bytes(2)), "'b' overlaps 'a'"),
    "a gap": (file_of({"a": entry(), "b": entry(offsets=[3, 5])}, bytes(5)), "'b' leaves a gap behind 'a'"),
    "a gap at the start": (file_of({"b": entry(offsets=[1, 3])}, bytes(3)), "'b' leaves a gap behind the header"),
    "bytes behind the end": (file_of({"w": entry()}, bytes(5)), "3 bytes behind 'w' belong to no tensor"),
    "bytes of nobody": (file_of({}, bytes(5)), "5 bytes behind the header belong to no tensor"),
    "a name of a megabyte": (file_of({"w" * 1_000_000: 3}, b""), "is not described by"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_format_does_not_allow(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedFileError, match=message) as caught:
            read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 500
    assert peak < 12 * len(content) + 100_000
