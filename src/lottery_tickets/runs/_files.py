"""Named tensors into a safetensors file, one after another: no second one is in memory for it.

The safetensors library writes what lies in memory as a whole. Here a tensor may come from an accelerator, or from
several processes that have a part each, and is there only for as long as its bytes take.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from lottery_tickets.errors import RunFolderError

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_ALIGNMENT = 8  # of what follows the header


@runtime_checkable
class Scattered(Protocol):
    """A tensor that several processes hold in parts, which is put together for the file.

    Attributes:
        shape: Of the whole.
        dtype: Its data type.
    """

    @property
    def shape(self) -> torch.Size: ...
    @property
    def dtype(self) -> torch.dtype: ...

    def whole(self) -> torch.Tensor | None:
        """All of it on the CPU, where it is written, else None; all processes make this call."""


Written = torch.Tensor | Scattered


def write_tensors(tensors: Mapping[str, Written], path: Path | None) -> None:
    """Write a safetensors file, or help those that do.

    Args:
        tensors: By name; of any strides and on any device. Those over the same memory are written each.
        path: The file; None where another process writes it. That one needs the parts that are here, and both go
            through the same names in the same order.

    Raises:
        RunFolderError: A data type that the format does not know.
        OSError: The file cannot be written.
        DistributedError: Another process failed or has gone.
    """
    # Widest first, so that each lies at a multiple of its elements' width.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    if path is None:
        for one in ordered.values():
            if isinstance(one, Scattered):
                one.whole()
        return
    with path.open("wb") as file:
        file.write(_header(ordered))
        for one in ordered.values():
            file.write(_bytes(one))  # without a name for what was put together, which would keep it


def _header(tensors: Mapping[str, Written]) -> bytes:
    entries, start = {}, 0
    for name, one in tensors.items():
        if one.dtype not in _NAMES:
            raise RunFolderError(
                f"{name} is of {one.dtype}, which no safetensors file can hold. Run without run_dir."
            )
        stop = start + one.shape.numel() * one.dtype.itemsize
        entries[name] = {"dtype": _NAMES[one.dtype], "shape": list(one.shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _bytes(one: Written) -> memoryview:
    """The elements, row-major; the same memory where they lie so already."""
    there = one.whole() if isinstance(one, Scattered) else one
    assert there is not None
    own = there.detach().cpu().contiguous()
    # Of one element or none any stride passes for contiguous, and bytes are seen through a stride of 1 alone.
    return own.as_strided((own.numel(),), (1,)).view(torch.uint8).numpy().data
