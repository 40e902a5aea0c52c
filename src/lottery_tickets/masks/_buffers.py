"""Memory that short-lived copies of weights take turns in.

Copies made one after another, each as large as a layer, would leave holes between the small tensors that outlive
them, and the allocator would fill a model's worth of them; and fresh memory costs more to touch than to fill.
"""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT = 64  # what torch's own allocator gives

_Memory = npt.NDArray[np.uint8]


class Buffers:
    """Makes tensors whose memory comes back when the last view of them is gone; keeps one buffer in waiting."""

    def __init__(self) -> None:
        self._waiting: list[_Memory] = []
        self._lent: dict[int, weakref.ref[Any]] = {}

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Contiguous CPU tensor with arbitrary contents."""
        size = shape.numel() * dtype.itemsize
        if not size:
            return torch.empty(shape, dtype=dtype)
        memory = self._take(size)
        lent = memory[:size]
        # The tensor's storage holds this view, so it dies with the storage, whoever else had the tensor.
        self._lent[id(lent)] = weakref.ref(lent, partial(self._give_back, id(lent), memory))
        # .data: autograd takes the tensor for one of its own and not for a view, so it may be written in place.
        return torch.from_numpy(lent).view(dtype).view(shape).data

    def _take(self, size: int) -> _Memory:
        try:
            memory = self._waiting.pop()
        except IndexError:
            return _aligned(size)
        return memory if memory.size >= size else _aligned(size)

    def _give_back(self, key: int, memory: _Memory, _: object) -> None:
        del self._lent[key]
        if not self._waiting or self._waiting[-1].size < memory.size:
            self._waiting[:] = [memory]


def _aligned(size: int) -> _Memory:
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
