"""What lies between two blocks while others compute: kept in memory, or written to a file and given back."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch

HiddenStates = Literal["memory", "disk"]


class Away(NamedTuple):
    """Memory that is in the file: of which storage, and which bytes there."""

    storage: torch.UntypedStorage
    start: int
    size: int


class StatesOnDisk:
    """Contents of tensors in a file.

    Args:
        spared: Tensors whose memory others look at too, which stays where it is.
        file: To write to and read from.
    """

    def __init__(self, spared: Iterable[torch.Tensor], file: Any) -> None:
        self._spared = {tensor.untyped_storage().data_ptr() for tensor in spared}
        self._file = file
        self._end = 0
        self._places: dict[int, tuple[int, int]] = {}

    def spare(self, batch: Any) -> None:
        """Leave the tensors of a batch where they are."""
        self._spared |= {tensor.untyped_storage().data_ptr() for tensor in tensors_in(batch)}

    def put_away(self, owner: int, tensor: torch.Tensor) -> Away | None:
        """Write a tensor's memory to the owner's place in the file, and free it; None where it has to stay.

        The tensor and all views of it stay what they are, and may not be looked at before `bring_back`.
        """
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        if not size or not storage.resizable() or storage.data_ptr() in self._spared:
            return None
        start, room = self._places.get(owner, (0, 0))
        if room < size:
            start, self._end = self._end, self._end + size
            self._places[owner] = start, size
        self._file.seek(start)
        self._file.write(_bytes_of(storage))
        storage.resize_(0)
        return Away(storage, start, size)

    def bring_back(self, away: Away) -> None:
        """Give a storage its memory and contents again."""
        away.storage.resize_(away.size)
        self._file.seek(away.start)
        self._file.readinto(_bytes_of(away.storage))


def tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors of nested mappings, tuples and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for one in value for tensor in tensors_in(one)]
    return []


def _bytes_of(storage: torch.UntypedStorage) -> memoryview:
    # An array of numpy's over the memory would keep the storage from being resized for good.
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")
