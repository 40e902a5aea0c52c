"""Where sums over gradients lie: in memory, beside the weights, or in a mapped file."""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from lottery_tickets.errors import ScoreError
from lottery_tickets.masks import Division

Store = Literal["cpu", "disk", "device"] | os.PathLike[str]
_ALIGNMENT = 64
_CODES = {torch.float32: "F32", torch.float64: "F64"}


class Tensors:
    """Named tensors of zeros of one floating-point type.

    Args:
        like: Names, shapes and devices.
        store: "cpu"; "device", each beside the tensor it is like; "disk", a mapped temporary file, without a name
            from the start and gone with the last tensor; or a path, a safetensors file that stays.
        dtype: float32 or float64.
    """

    def __init__(self, like: Mapping[str, torch.Tensor], store: Store, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self._map: mmap.mmap | None = None
        self._spans: dict[str, tuple[int, int]] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        self._like: Mapping[str, torch.Tensor] = {}
        self._beside = False
        if isinstance(store, os.PathLike) or store == "disk":
            self._tensors = self._mapped({name: one.shape for name, one in like.items()}, store)
        elif store in ("cpu", "device"):
            self._like = like
            self._beside = store == "device"
        else:
            raise ScoreError(f"store is 'cpu', 'disk', 'device' or a path, got {store!r}.")

    @contextmanager
    def use(self, name: str) -> Iterator[torch.Tensor]:
        """One tensor, to read and write; the pages of a mapped one leave this process's memory afterwards."""
        try:
            yield self._there(name)
        finally:
            if self._map is not None and self._spans[name][1]:
                # The mapping is shared, so what was written stays in the file.
                self._map.madvise(mmap.MADV_DONTNEED, *self._pages(name))

    def all(self) -> dict[str, torch.Tensor]:
        """The tensors themselves."""
        return {name: self._there(name) for name in self._like or self._tensors}

    def _there(self, name: str) -> torch.Tensor:
        # Not before it is needed: at the start of a backward pass memory is full of activations.
        if name not in self._tensors:
            like = self._like[name]
            device = like.device if self._beside else "cpu"
            self._tensors[name] = torch.zeros(like.shape, dtype=self.dtype, device=device)
        return self._tensors[name]

    def _mapped(self, shapes: Mapping[str, torch.Size], store: Store) -> dict[str, torch.Tensor]:
        header, size = self._layout(shapes)
        if isinstance(store, os.PathLike):
            descriptor = os.open(Path(store), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        else:
            descriptor, name = tempfile.mkstemp(prefix="lottery-tickets-", suffix=".safetensors")
            Path(name).unlink()
        try:
            os.write(descriptor, header)
            os.truncate(descriptor, size)
            self._map = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        return {
            name: torch.frombuffer(
                self._map, dtype=self.dtype, count=shape.numel(), offset=self._spans[name][0]
            ).view(shape)
            if shape.numel()
            else torch.zeros(shape, dtype=self.dtype)
            for name, shape in shapes.items()
        }

    def _layout(self, shapes: Mapping[str, torch.Size]) -> tuple[bytes, int]:
        """The file's header, as safetensors defines it, and the file's length."""
        entries, offset = {}, 0
        for name, shape in shapes.items():
            length = shape.numel() * self.dtype.itemsize
            entries[name] = {
                "dtype": _CODES[self.dtype],
                "shape": list(shape),
                "data_offsets": [offset, offset + length],
            }
            self._spans[name] = (offset, length)
            offset += length
        text = json.dumps(entries).encode()
        text += b" " * (-(len(text) + 8) % _ALIGNMENT)
        start = len(text) + 8
        self._spans = {name: (start + begin, length) for name, (begin, length) in self._spans.items()}
        return len(text).to_bytes(8, "little") + text, start + offset

    def _pages(self, name: str) -> tuple[int, int]:
        begin, length = self._spans[name]
        first = begin // mmap.PAGESIZE * mmap.PAGESIZE
        return first, math.ceil((begin + length - first) / mmap.PAGESIZE) * mmap.PAGESIZE


def write_whole(path: os.PathLike[str], parts: Mapping[str, torch.Tensor], division: Division) -> None:
    """Write tensors that lie in parts on ranks as one safetensors file, which rank 0 does, tensor by tensor.

    Args:
        path: Of the file.
        parts: Name to what this rank holds, float32 on any device.
        division: How they are spread; all of its ranks make this call.
    """
    ranks = division.ranks
    like = {name: torch.empty(shape, device="meta") for name, shape in division.shapes.items()}
    file = Tensors(like, path) if ranks.first else None
    for name, part in parts.items():
        mine = (division.shards[name], part.cpu().numpy()) if name in division.counted else None
        told = ranks.collect(mine)
        if file is None or told is None:
            continue
        with file.use(name) as whole:
            for shard, values in (one for one in told if one is not None):
                whole.numpy()[np.ix_(*shard.indices)] = values
