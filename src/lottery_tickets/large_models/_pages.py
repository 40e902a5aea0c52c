"""Weights mapped from files, and advice to the system: what to read next, what is done with.

Mapped weights are read by touching them. Left alone, the system reads a little at a time and waits in between, and
keeps what was touched until memory runs short. So a thread asks for the blocks whose turn is next, and pages of
blocks that are done are given back. Both are advice: weights are the same without it, where a platform has none.
"""

from __future__ import annotations

import bisect
import mmap
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models._checkpoints import StoredTensor
from lottery_tickets.sparsity import Turn

TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_AHEAD = 64 << 20
# Systems may cut a longer request short.
_REQUEST = 512 << 10


class _Mapped(NamedTuple):
    """A file in memory: where it begins there, and what to give advice to."""

    address: int
    memory: mmap.mmap
    descriptor: int


class _Place(NamedTuple):
    """Bytes [start, start + size) of a mapped file."""

    file: _Mapped
    start: int
    size: int

    def fetch(self) -> None:
        """Ask for the bytes, without waiting for them."""
        if hasattr(os, "posix_fadvise"):
            for start in range(self.start, self.start + self.size, _REQUEST):
                size = min(_REQUEST, self.start + self.size - start)
                os.posix_fadvise(self.file.descriptor, start, size, os.POSIX_FADV_WILLNEED)

    def give_back(self) -> None:
        """Take the pages out of this process; the system keeps them as long as it has room."""
        if hasattr(mmap, "MADV_DONTNEED") and self.size:
            start = self.start // mmap.PAGESIZE * mmap.PAGESIZE
            self.file.memory.madvise(mmap.MADV_DONTNEED, start, self.start + self.size - start)


class FilePages:
    """Advice about weights that `mapped` gave; see `sparsity.Pages`."""

    def __init__(self, files: Sequence[_Mapped]) -> None:
        self._files = sorted(files, key=lambda file: file.address)
        self._addresses = [file.address for file in self._files]

    def gather(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Copies of short rows, all asked for before the first is waited for."""
        if not hasattr(os, "preadv"):
            return [view.reshape(-1) for view in views]
        rows = [self._rows_of(view) for view in views]
        for places in rows:
            for place in places:
                place.fetch()
        # Touching mapped rows would bring in what lies around them.
        gathered = []
        for view, places in zip(views, rows, strict=True):
            copy = torch.zeros(view.numel(), dtype=view.dtype)
            content, filled = copy.view(torch.uint8).numpy().data, 0
            for place in places:
                os.preadv(place.file.descriptor, [content[filled : filled + place.size]], place.start)
                filled += place.size
            gathered.append(copy)
        return gathered

    def _rows_of(self, view: torch.Tensor) -> list[_Place]:
        first = self._place_of(view)
        stride, size = view.stride(0) * view.element_size(), view.shape[1] * view.element_size()
        return [_Place(first.file, first.start + row * stride, size) for row in range(view.shape[0])]

    def fetch(self, tensors: Iterable[torch.Tensor]) -> None:
        """Ask for the weights, in their order; may wait while the disk has much to do."""
        for tensor in tensors:
            if tensor.numel():
                self._place_of(tensor).fetch()

    def give_back(self, tensors: Iterable[torch.Tensor]) -> None:
        """Take the pages of these weights out of this process."""
        for tensor in tensors:
            if tensor.numel():
                self._place_of(tensor).give_back()

    @contextmanager
    def reading(self, runs: Sequence[torch.Tensor]) -> Iterator[Turn]:
        """Ask for each run a little ahead of its turn, and give its pages back afterwards."""
        turns = _Turns([self._place_of(run) if run.numel() else None for run in runs])
        thread = threading.Thread(target=turns.fetch_ahead, name="read-ahead", daemon=True)
        thread.start()
        try:
            yield turns.take
        finally:
            turns.stop()
            thread.join()

    def _place_of(self, tensor: torch.Tensor) -> _Place:
        address = tensor.data_ptr()
        file = self._files[bisect.bisect_right(self._addresses, address) - 1]
        return _Place(file, address - file.address, tensor.numel() * tensor.element_size())


class _Turns:
    """Runs that are read in turn, by any number of threads, and one that fetches them ahead."""

    def __init__(self, places: Sequence[_Place | None]) -> None:
        self._places = places
        self._changed = threading.Condition()
        self._begun: set[int] = set()
        self._fetched: set[int] = set()
        self._in_flight = 0
        self._stopped = False

    def fetch_ahead(self) -> None:
        """Ask for one run after the other, as far ahead as is allowed; not for those whose turn has come."""
        for turn, place in enumerate(self._places):
            if place is None:
                continue
            with self._changed:
                while not self._may_fetch(place.size):
                    self._changed.wait()
                if self._stopped:
                    return
                if turn in self._begun:
                    continue
                self._fetched.add(turn)
                self._in_flight += place.size
            place.fetch()

    def _may_fetch(self, size: int) -> bool:
        # One run goes ahead in any case: it may be larger than what is allowed.
        return self._stopped or self._in_flight <= 0 or self._in_flight + size <= _AHEAD

    @contextmanager
    def take(self, turn: int) -> Iterator[None]:
        """The time in which this run is read."""
        place = self._places[turn]
        if place is None:
            yield
            return
        with self._changed:
            self._begun.add(turn)
        try:
            yield
        finally:
            place.give_back()
            with self._changed:
                if turn in self._fetched:
                    self._in_flight -= place.size
                    self._changed.notify()

    def stop(self) -> None:
        """Fetch no more."""
        with self._changed:
            self._stopped = True
            self._changed.notify()


@contextmanager
def mapped(
    folder: Path, stored: Mapping[str, StoredTensor]
) -> Iterator[tuple[dict[str, torch.Tensor], FilePages]]:
    """Tensors that lie in files, by name, for the time of the block; they must not be written to.

    Args:
        folder: Of the checkpoint.
        stored: Name to place; of a data type in `TYPES`.

    Raises:
        CheckpointError: A file that has become shorter than its header says.
    """
    with ExitStack() as files:
        shards = sorted({tensor.file for tensor in stored.values()})
        opened = {shard: _mapped_file(folder / shard, files) for shard in shards}
        for tensor in stored.values():
            if tensor.stop > len(opened[tensor.file].memory):
                raise CheckpointError(f"{folder / tensor.file}: cut short after its header was read.")
        tensors = {name: _tensor(opened[tensor.file].memory, tensor) for name, tensor in stored.items()}
        yield tensors, FilePages(list(opened.values()))


def _mapped_file(path: Path, files: ExitStack) -> _Mapped:
    descriptor = files.enter_context(path.open("rb")).fileno()
    memory = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    return _Mapped(np.frombuffer(memory, np.uint8).ctypes.data, memory, descriptor)


def _tensor(memory: mmap.mmap, stored: StoredTensor) -> torch.Tensor:
    dtype = TYPES[stored.dtype]
    if not stored.shape.numel():
        return torch.empty(stored.shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        flat = torch.frombuffer(memory, dtype=dtype, count=stored.shape.numel(), offset=stored.start)
    return flat.view(stored.shape)
