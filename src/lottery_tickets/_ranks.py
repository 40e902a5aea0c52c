"""Processes that work on one thing together: sums, small messages, and errors that end the work of all.

Every collective here begins with a few numbers on which the ranks agree: that nobody has failed, and that all are
about to do the same. So a rank that raises between two collectives is heard at the next one, and ranks that went
different ways are told so instead of waiting for each other. Only calls of `torch.distributed` are used, on
whatever device the group's backend takes, a group without a process group being this process alone.
"""

from __future__ import annotations

import json
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from lottery_tickets import errors
from lottery_tickets.errors import DistributedError, LotteryTicketError

_Array = TypeVar("_Array", npt.NDArray[np.int64], npt.NDArray[np.float64])
_R = TypeVar("_R")

# How long a rank waits for a sign of life from the others before it names those that gave none.
_ROLL_CALL_SECONDS = 5.0


class _Step(IntEnum):
    """What ranks may do together."""

    END = 1
    SUM = 2
    GATHER = 3
    COLLECT = 4
    LEAST = 5
    BRING = 6
    HAND_OUT = 7
    SHARE_OUT = 8


class Ranks:
    """The ranks of a process group, or this process alone.

    All ranks make the same calls in the same order. Integers add to the same sum in any order; floating-point
    numbers are added once, by one rank's order, and handed out, so every rank has the same bits.

    Attributes:
        rank: Of this process, from 0.
        size: Number of processes.
        sent: Bytes that this process has handed to collectives so far.
        group: The process group; None for this process alone.

    Raises:
        DistributedError: This process is not in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, device: torch.device | str | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.sent = 0
        if self.rank < 0:
            raise DistributedError("This process is not in the process group; call from the group's ranks only.")
        self._device = torch.device("cpu") if group is None else _device_for(group, device)

    @classmethod
    def world(cls, device: torch.device | str | None = None) -> Ranks:
        """All processes of this job: the default process group, or this process alone where there is none.

        Args:
            device: Where collectives find their tensors, if the backend does not take the CPU's.
        """
        joined = dist.is_available() and dist.is_initialized()
        return cls(dist.group.WORLD if joined else None, device)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and logs."""
        return self.rank == 0

    # ---------------------------------------------------------------- collectives

    def sum(self, numbers: _Array) -> _Array:
        """Sum over the ranks of an int64 or float64 array of the same shape on each."""
        total = numbers.copy()
        self.add_up(torch.from_numpy(total))
        return total

    def add_up(self, tensor: torch.Tensor) -> None:
        """Put the sum over the ranks of a tensor, the same in shape and type on each, into its place.

        A tensor on another device than the collectives' is carried there whole.
        """
        if self.group is None:
            return
        self._agree(_Step.SUM, tensor.numel() * tensor.element_size())
        if not tensor.numel():
            return
        there = tensor.detach().to(self._device).contiguous()
        if tensor.dtype.is_floating_point:
            first = dist.get_global_rank(self.group, 0)
            self._call(dist.reduce, there, first)
            self._call(dist.broadcast, there, first)
            self.sent += there.nbytes
        else:
            self._call(dist.all_reduce, there)
        self.sent += there.nbytes
        if there.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(there)

    def hand_out(self, tensor: torch.Tensor) -> None:
        """Put rank 0's tensor, the same in shape and type on each, into the place of every rank's."""
        if self.group is None:
            return
        self._agree(_Step.HAND_OUT, tensor.numel() * tensor.element_size())
        there = tensor.detach().to(self._device).contiguous()
        self._call(dist.broadcast, there, dist.get_global_rank(self.group, 0))
        self.sent += there.nbytes if self.first else 0
        if there.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(there)

    def share_out(self, rows: torch.Tensor, what: str) -> torch.Tensor:
        """The sum over the ranks of this rank's row; each row is that of one rank, all as long.

        Args:
            rows: (ranks, numbers), contiguous, the same in shape and type on each, on a device that the group's
                backend takes.
            what: Which sum this is, the same on each.
        """
        if self.group is None:
            return rows[0]
        self._agree(_Step.SHARE_OUT, zlib.crc32(what.encode()) << 8, said=f"the sum of {what}")
        mine = torch.empty_like(rows[0])
        if mine.numel():
            self._call(dist.reduce_scatter, mine, list(rows))
            self.sent += rows.nbytes
        return mine

    def least(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The smallest over the ranks of each number of an array of the same shape on each."""
        if self.group is None:
            return numbers
        self._agree(_Step.LEAST, numbers.nbytes)
        there = torch.from_numpy(numbers.copy()).to(self._device)
        self._call(dist.all_reduce, there, dist.ReduceOp.MIN)
        self.sent += there.nbytes
        return there.cpu().numpy()

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, on every rank; it must pickle."""
        if self.group is None:
            return [value]
        mine, sizes = self._packed(_Step.GATHER, value)
        return _unpickled(self._all_gather(mine), sizes)

    def collect(self, value: Any) -> list[Any] | None:
        """What each rank gives, on rank 0; None on the others. It must pickle."""
        if self.group is None:
            return [value]
        mine, sizes = self._packed(_Step.COLLECT, value)
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.first else None
        self._call(dist.gather, mine, parts, dst=dist.get_global_rank(self.group, 0))
        self.sent += 0 if self.first else mine.nbytes
        return None if parts is None else _unpickled(parts, sizes)

    def bring(self, tensor: torch.Tensor, shapes: Sequence[torch.Size]) -> Iterator[torch.Tensor]:
        """Each rank's tensor in turn, on rank 0, one at a time; none on the others, who give theirs meanwhile.

        Args:
            tensor: What this rank has, contiguous; the same data type on all.
            shapes: Of what each rank has.

        Yields:
            This rank's tensor as it was given, those of others where collectives find theirs.
        """
        if self.group is None:
            yield tensor
            return
        self._agree(_Step.BRING, sum(shape.numel() for shape in shapes) * tensor.element_size())
        if not self.first and tensor.numel():
            there = tensor.detach().to(self._device)
            self._call(dist.send, there.view(-1).view(torch.uint8), dist.get_global_rank(self.group, 0))
            self.sent += there.nbytes
        for rank, shape in enumerate(shapes if self.first else ()):
            if rank == 0 or not shape.numel():
                yield tensor if rank == 0 else tensor.new_empty(shape)
                continue
            there = torch.empty(shape, dtype=tensor.dtype, device=self._device)
            self._call(dist.recv, there.view(-1).view(torch.uint8), dist.get_global_rank(self.group, rank))
            yield there

    def _packed(self, step: _Step, value: Any) -> tuple[torch.Tensor, list[int]]:
        """A value as bytes, as many on every rank, and how many of them are each rank's own."""
        packed = np.frombuffer(pickle.dumps(value, pickle.HIGHEST_PROTOCOL), np.uint8)
        longest = self._agree(step, packed.size, alike=False)
        sizes = self._all_gather(torch.tensor([packed.size], device=self._device))
        padded = np.zeros(longest, np.uint8)
        padded[: packed.size] = packed
        return torch.from_numpy(padded).to(self._device), [int(size) for size in sizes]

    def _all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        self._call(dist.all_gather, parts, tensor)
        self.sent += tensor.nbytes
        return parts

    def check_asked_alike(self, asked: str) -> None:
        """Refuse to go on if the ranks are asked for different things.

        Raises:
            DistributedError: They are; it says what rank 0 is asked for, and the first that differs.
        """
        for rank, other in enumerate(everyone := self.gather(asked)):
            if other != everyone[0]:
                raise DistributedError(
                    f"The ranks are asked for different things: rank {self._number(0)} for {everyone[0]}; rank "
                    f"{self._number(rank)} for {other}. Pass the same arguments on all."
                )

    # ---------------------------------------------------------------- failing together

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block in which an error on one rank becomes an error on all, at their next collective here.

        The collectives in it are those of this object only; for a block with others see `watched`. The first
        rank that failed raises what it raised, the others the same error if it is one of this library, else a
        `DistributedError` that shows it. Blocks may lie in each other.

        Raises:
            DistributedError: Another rank failed, has gone, or does something else.
        """
        try:
            yield
        except Exception as error:
            if self.group is not None and not getattr(error, "_told_to_all", False):
                self._fail(error)
            raise
        if self.group is not None:
            self._agree(_Step.END, 0)

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """A block with collectives of others, such as the passes of a sharded model.

        A rank that raises here cannot be heard by those that wait for it in such a collective, so it leaves word
        of its error and raises at once. The others learn of it when its process ends or the group's time is up,
        and their error then names it.

        Args:
            what: What is being done, for the message.

        Raises:
            DistributedError: Another rank failed or has gone.
        """
        try:
            yield
        except Exception as error:
            if self.group is None or getattr(error, "_told_to_all", False):
                raise
            if _is_of_backend(error):
                raise _told(DistributedError(self._why(what))) from error
            self._leave_word(error)
            _told(error)  # as far as it can be: blocks around this one do not wait for the others
            raise

    def _agree(self, step: _Step, size: int, *, alike: bool = True, said: str | None = None) -> int:
        """The largest size that a rank says, once all are known to take the same step and none has failed.

        Args:
            step: What this rank is about to do.
            size: Of it, in bytes or as another number that tells what is done.
            alike: Whether all have to say the same size.
            said: What is done, in words, for the error where ranks do different things.
        """
        low = -size if alike else 0
        failed, most, least, longest, shortest = self._header([0, step, -step, size, low])
        if failed:
            self._raise_first(None)
        if most != -least or (alike and longest != -shortest):
            calls = self._gather_plainly(said or f"{step.name.lower()} of {size} bytes")
            raise _told(
                DistributedError(
                    "The ranks do different things: "
                    + "; ".join(f"rank {self._number(rank)}: {call}" for rank, call in enumerate(calls))
                    + ". All make the same calls with the same arguments on the same model."
                )
            )
        return longest

    def _fail(self, error: Exception) -> None:
        """Let the others know at their next collective."""
        self._header([1, 0, 0, 0, 0])
        self._raise_first(error)

    def _header(self, numbers: list[int]) -> list[int]:
        header = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        self._call(dist.all_reduce, header, dist.ReduceOp.MAX)
        self.sent += header.nbytes
        agreed: list[int] = header.tolist()
        return agreed

    def _raise_first(self, error: Exception | None) -> None:
        """Raise what the first rank that failed has raised."""
        found = self._gather_plainly(None if error is None else (type(error).__name__, str(error)))
        first, (kind, message) = next((rank, told) for rank, told in enumerate(found) if told is not None)
        if first == self.rank and error is not None:
            raise _told(error)
        raise _told(_same_error(self._number(first), kind, message)) from error

    def _gather_plainly(self, value: Any) -> list[Any]:
        """`gather` without agreeing first."""
        found: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, found, value)
        return found

    def _call(self, collective: Callable[..., _R], *arguments: Any, **options: Any) -> _R:
        try:
            return collective(*arguments, **options, group=self.group)
        except RuntimeError as error:
            raise _told(DistributedError(self._why(f"{collective.__name__} of {self.size} ranks"))) from error

    # ---------------------------------------------------------------- who has gone

    def _leave_word(self, error: Exception) -> None:
        store = self._store()
        number = store.add("failures", 1)
        store.set(f"failure{number}", json.dumps([self.rank, type(error).__name__, str(error)]))

    def _why(self, what: str) -> str:
        """What is known of the end of a collective: an error that a rank left word of, or who does not answer."""
        try:
            store = self._store()
            if store.add("failures", 0):
                rank, kind, message = json.loads(store.get("failure1"))
                return f"{what} ended: rank {self._number(rank)} failed: {kind}: {message}"
            store.set(f"here{self.rank}", "")
            silent = [self._number(rank) for rank in self._silent(store)]
        except RuntimeError:  # the store's errors all derive from it
            return f"{what} ended: rank {self._number(0)}, which usually keeps the group's store, has gone."
        if silent:
            listed = ", ".join(map(str, silent))
            return f"{what} ended: no answer from rank {listed}, which has ended or lost its connection."
        return f"{what} ended: the backend failed, though all ranks still answer."

    def _silent(self, store: Store) -> list[int]:
        """Ranks that do not come to the store within the time of a roll call."""
        # The store often lives in rank 0, which therefore leaves last.
        end = time.monotonic() + _ROLL_CALL_SECONDS + self.first
        silent = list(range(self.size))
        while silent and time.monotonic() < end:
            time.sleep(_ROLL_CALL_SECONDS / 100)
            silent = [rank for rank in silent if not store.check([f"here{rank}"])]
        return silent

    def _store(self) -> Store:
        assert self.group is not None
        place = f"lottery_tickets/{self.group.group_name}"
        return PrefixStore(place, distributed_c10d._get_default_store())

    def _number(self, rank: int) -> int:
        """The number that a rank of the group has in the job."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _unpickled(parts: list[torch.Tensor], sizes: list[int]) -> list[Any]:
    # From processes of the same job, which could do whatever they like without it.
    return [pickle.loads(part.cpu().numpy()[:size].tobytes()) for part, size in zip(parts, sizes, strict=True)]


def _device_for(group: dist.ProcessGroup, device: torch.device | str | None) -> torch.device:
    """Where the group's collectives take their tensors: the CPU if they can, since counts are made there."""
    kinds = [kind.type for kind in group._device_types]
    if not kinds or "cpu" in kinds:
        return torch.device("cpu")
    if device is not None and torch.device(device).type in kinds:
        return torch.device(device)
    return torch.device(kinds[0])


def _is_of_backend(error: Exception) -> bool:
    """Whether a collective raised this, and not what was computed between collectives."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "connection", "timed out", "timeout", "socket")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _told(error: Exception) -> Exception:
    """The error, marked as one that all ranks know of."""
    error._told_to_all = True  # type: ignore[attr-defined]
    return error


def _same_error(rank: int, kind: str, message: str) -> Exception:
    """An error of this library again, of another kind one that shows it."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, LotteryTicketError):
        again = found.__new__(found)
        again.args = (message,)
        return again
    return DistributedError(f"rank {rank} failed: {kind}: {message}")
