"""Weights as blocks of integers, for counting.

A block is a flat run of one tensor's weights in row-major order, read as integers with the weights' bits. On the
CPU a contiguous tensor gives blocks without a copy; strides, mixed data types and re-scored weights are gathered
block by block, so that nothing as large as a tensor is made.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from lottery_tickets.errors import WeightsError

INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
WORD = 64

# What the blocks in flight may take together, whatever the number of threads.
_SCRATCH_BYTES = 32 << 20
# Buffers as large as a block that are alive at one time, where weights lie contiguous and where they are gathered:
# there each conversion makes one, and the allocator keeps some of those it gets back.
_BUFFERS_READ = 2
_BUFFERS_GATHERED = 16
_LARGEST_BLOCK = 1 << 21
_SMALLEST_BLOCK = 1 << 14
_RUN = 32

Rescore = Callable[[str, torch.Tensor], torch.Tensor]
# Sums an array of counts over the ranks of a process group.
Reduce = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
_T = TypeVar("_T")
_R = TypeVar("_R")


# The time in which a run of weights is read, by its number.
Turn = Callable[[int], AbstractContextManager[None]]


class Pages(Protocol):
    """What is told where weights are about to be read, if they lie in files; it advises, and changes no weight."""

    def gather(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Flat copies of views, each of short rows that lie far apart, read without what lies between."""

    def reading(self, runs: Sequence[torch.Tensor]) -> AbstractContextManager[Turn]:
        """These contiguous tensors will be read in this order: ask for each a little ahead of its turn.

        What the context gives is a context for the time in which a run, by its number, is read.
        """


@dataclass(frozen=True)
class Block:
    """Weights [start, stop) of the tensor at `tensor`; where they are packed, `start` is a multiple of 64."""

    tensor: int
    start: int
    stop: int


class Weights:
    """Named tensors of weights, cut into blocks of integers of one common width.

    Args:
        tensors: Name to a strided floating-point tensor on any device.
        rescore: Function from a name and a flat block of its weights to scores to rank in their place, of dtype
            `dtype`; it must give the same scores each time.
        dtype: What weights are compared in; by default the smallest type that holds all of them exactly.
        nan_first: Rank NaN below zero instead of refusing it. Magnitudes are then counted one higher, which
            leaves 0 for NaN.
        pages: What is told where weights will be read, if they lie in files.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        rescore: Rescore | None = None,
        dtype: torch.dtype | None = None,
        nan_first: bool = False,
        pages: Pages | None = None,
    ) -> None:
        self.tensors = rankable(tensors)
        self.names = tuple(self.tensors)
        self.dtype = dtype or common_dtype(tensor.dtype for tensor in self.tensors.values() if tensor.numel())
        self.numel = sum(tensor.numel() for tensor in self.tensors.values())
        self._rescore = rescore
        self._nan_first = nan_first
        self._pages = pages
        self._flat = tuple(self.tensors.values())
        self._views = [self._without_copy(tensor) for tensor in self._flat]
        read, gathered = block_size(self.dtype, _BUFFERS_READ), block_size(self.dtype, _BUFFERS_GATHERED)
        sizes = [gathered if view is None else read for view in self._views]
        self.blocks = [
            Block(index, start, min(start + size, tensor.numel()))
            for index, (tensor, size) in enumerate(zip(self._flat, sizes, strict=True))
            for start in range(0, tensor.numel(), size)
        ]

    @property
    def in_files(self) -> bool:
        """Whether each pass is a pass over a disk."""
        return self._pages is not None

    def for_each(
        self,
        work: Callable[[Block], _R],
        blocks: Sequence[Block] | None = None,
        *,
        progress: str | None = None,
        backwards: bool = False,
    ) -> list[_R]:
        """Map over blocks (all of them unless told), on threads; see `for_each`.

        Backwards begins at the end, where a file that was just read is still in memory; the results keep their
        order.
        """
        blocks = self.blocks if blocks is None else blocks
        turns = blocks[::-1] if backwards else blocks
        results = for_each_run(work, turns, self._run, self._pages, progress=progress)
        return results[::-1] if backwards else results

    @property
    def width(self) -> int:
        """Bits of a weight without its sign."""
        return self.dtype.itemsize * 8 - 1

    @property
    def infinity(self) -> int:
        """The key of +inf: the largest magnitude that is a number."""
        return pattern_of(float("inf"), self.dtype) + self._nan_first

    def value_of(self, key: int) -> float:
        """The magnitude that ranks at this key."""
        if self._nan_first and key == 0:
            return float("nan")
        return float(torch.tensor(key - self._nan_first, dtype=INTEGERS[self.dtype]).view(self.dtype).item())

    def integers(self, block: Block) -> torch.Tensor:
        """The block's weights as integers that rank by their low bits, on the tensor's device."""
        view = self._views[block.tensor]
        if view is not None:
            return view[block.start : block.stop]
        return self._ranked(block.tensor, flat_range(self._flat[block.tensor], block.start, block.stop))

    def magnitudes(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Keys [start, stop) of the only tensor: integers that rank as the weights do, on the CPU."""
        integers = self.integers(Block(0, start, stop)).cpu().numpy()
        keys: npt.NDArray[Any] = integers & np.iinfo(integers.dtype).max
        return keys

    def sample(self, size: int) -> list[torch.Tensor] | None:
        """About `size` weights as integers, in short runs spread evenly; None where strides forbid a cheap one."""
        runs = -(-size // _RUN)
        if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in self._flat):
            return None
        rows = [
            (index, _evenly_spread(tensor.view(-1), -(-runs * tensor.numel() // self.numel), index))
            for index, tensor in enumerate(self._flat)
            if tensor.numel()
        ]
        views = [spread for _, spread in rows]
        flat = [view.reshape(-1) for view in views] if self._pages is None else self._pages.gather(views)
        return [self._ranked(index, values) for (index, _), values in zip(rows, flat, strict=True)]

    def _run(self, block: Block) -> torch.Tensor:
        """The block's weights as they are stored; none of a tensor that is not contiguous."""
        tensor = self._flat[block.tensor]
        return tensor.view(-1)[block.start : block.stop] if tensor.is_contiguous() else tensor.new_empty(0)

    def _without_copy(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor's own memory as flat integers, if they rank as they lie there."""
        if self._rescore or self._nan_first or tensor.dtype != self.dtype or not tensor.is_contiguous():
            return None
        if _is_misaligned(tensor):  # in a file whose header has an odd length
            return None
        return tensor.view(-1).view(INTEGERS[self.dtype])

    def _ranked(self, index: int, values: torch.Tensor) -> torch.Tensor:
        if self._rescore is not None:
            values = self._rescore(self.names[index], values)
        if _is_misaligned(values):
            values = values.clone()
        integers = values.to(self.dtype).contiguous().view(INTEGERS[self.dtype])
        if not self._nan_first:
            return integers
        magnitudes = integers & torch.iinfo(integers.dtype).max
        return torch.where(magnitudes < self.infinity, magnitudes + 1, 0)


MakeWeights = Callable[[Mapping[str, torch.Tensor]], Weights]


def common_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Smallest floating-point type that holds every value of these types exactly; float32 for no types."""
    distinct = set(dtypes)
    return functools.reduce(torch.promote_types, distinct) if distinct else torch.float32


def rankable(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors without their gradients, if all have magnitudes to rank.

    Raises:
        WeightsError: One that has none; it is named.
    """
    return {name: _rankable(name, tensor) for name, tensor in tensors.items()}


def refuse_nan(counts: Mapping[str, int]) -> None:
    """Raise if a tensor holds NaN.

    Raises:
        WeightsError: Every such tensor is named, with how many.
    """
    if any(counts.values()):
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
        raise WeightsError(
            f"NaN has no rank among magnitudes; found in {listed}. Repair the weights; where masks are drawn, "
            "nan='prune' lets NaN go first."
        )


def pattern_of(value: float, dtype: torch.dtype) -> int:
    """The bits of |value| as a non-negative integer."""
    return int(torch.tensor(abs(value), dtype=dtype).view(INTEGERS[dtype]).item())


def block_size(dtype: torch.dtype, buffers: int) -> int:
    """Weights per block, so that this many buffers a thread stay within the scratch memory."""
    fitting = _SCRATCH_BYTES // (buffers * dtype.itemsize * torch.get_num_threads())
    return max(_SMALLEST_BLOCK, min(_LARGEST_BLOCK, fitting)) // WORD * WORD


def for_each(work: Callable[[_T], _R], items: Sequence[_T], *, progress: str | None = None) -> list[_R]:
    """Map on as many threads as torch uses; a progress bar appears after two seconds if named.

    Threads take the next item themselves: a future for each block would cost as much as counting a small one.
    """
    if len(items) <= 1:
        return [work(item) for item in items]
    pending = deque(enumerate(items))
    results: dict[int, _R] = {}
    updating = threading.Lock()

    def next_item() -> tuple[int, _T] | None:
        try:
            return pending.popleft()
        except IndexError:
            return None

    def take_items() -> None:
        try:
            while (item := next_item()) is not None:
                results[item[0]] = work(item[1])
                with updating:
                    bar.update()
        finally:
            pending.clear()  # after an error the other threads stop too

    threads = min(torch.get_num_threads(), len(items))
    with (
        tqdm(total=len(items), desc=progress, delay=2, disable=progress is None) as bar,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for ended in [pool.submit(take_items) for _ in range(threads)]:
                ended.result()
        finally:
            pending.clear()  # an interrupt of this thread stops them likewise
    return [results[index] for index in range(len(items))]


def for_each_run(
    work: Callable[[_T], _R],
    items: Sequence[_T],
    run_of: Callable[[_T], torch.Tensor],
    pages: Pages | None,
    *,
    progress: str | None = None,
) -> list[_R]:
    """`for_each`, where each item reads the run of weights that stands for it, if they lie in files."""
    if pages is None:
        return for_each(work, items, progress=progress)
    with reading_ahead(pages, [run_of(item) for item in items]) as reading:

        def work_on(turn: int) -> _R:
            with reading(turn):
                return work(items[turn])

        return for_each(work_on, range(len(items)), progress=progress)


@contextmanager
def reading_ahead(pages: Pages | None, runs: Sequence[torch.Tensor]) -> Iterator[Turn]:
    """`Pages.reading` of the runs that lie contiguous, the others unannounced; nothing without pages."""
    if pages is None:
        yield lambda turn: nullcontext()
        return
    with pages.reading([run if run.is_contiguous() else run.new_empty(0) for run in runs]) as reading:
        yield reading


def flat_range(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Elements [start, stop) in row-major order, flat; a view where the strides allow it."""
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop]
    if tensor.dim() == 1:
        return tensor[start:stop]
    row = tensor[0].numel()
    first, last = start // row, (stop - 1) // row
    if first == last:
        return flat_range(tensor[first], start - first * row, stop - first * row)
    return torch.cat(
        [
            flat_range(tensor[first], start - first * row, row),
            tensor[first + 1 : last].reshape(-1),
            flat_range(tensor[last], 0, stop - last * row),
        ]
    )


def _evenly_spread(values: torch.Tensor, runs: int, turn: int) -> torch.Tensor:
    """About `runs` short rows of a flat tensor, at an odd distance so that they do not follow its columns.

    Every `turn` starts elsewhere: tensors that resemble each other are not sampled at the same places.
    """
    distance = max(values.numel() // runs - 1, 0) | 1
    if distance <= _RUN:
        return values.view(1, -1)
    whole = values.numel() // distance
    start = turn * _RUN % (distance - _RUN)
    return values[: whole * distance].view(whole, distance)[:, start : start + _RUN]


def _is_misaligned(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.data_ptr() % tensor.element_size() != 0


def _rankable(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise WeightsError(f"{name}: expected a tensor of weights, got {type(tensor).__name__}.")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise WeightsError(
            f"{name}: {type(tensor).__name__} is not a plain tensor; rank its local or full tensor instead."
        )
    if tensor.is_meta:
        raise WeightsError(f"{name} is on the meta device and has no values; load the model's weights first.")
    if tensor.layout != torch.strided or tensor.dtype not in INTEGERS:
        raise WeightsError(
            f"{name}: weights are ranked by magnitude in bfloat16, float16, float32 or float64, strided; got "
            f"{tensor.dtype}, {tensor.layout}. Convert or exclude it."
        )
    return tensor.detach()
