"""Processes of a process group, for tests of what several ranks do together.

One process imports everything and computes nothing; the ranks are forked from it, so a world of them starts in a
moment. Worlds of one size stay until the end of the session and obey many orders: `ranks(4).run(function, ...)`. A
test in which a rank is killed or a group is broken takes a world of its own: `with ranks.own(3) as world`.

The functions are those of test modules, called as `function(rank, *arguments)` with a gloo group of the world's
size in place, and what they take and give is pickled.
"""

from __future__ import annotations

import datetime
import os
import pickle
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import lottery_tickets

# A rank that says nothing for so long hangs.
_PATIENCE_SECONDS = 120
_GROUP_TIMEOUT = datetime.timedelta(seconds=60)


class GoneError(Exception):
    """The rank's process ended before it gave an answer."""


class World:
    """Ranks of one process group, each waiting for orders."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returns; an error on any is raised, with where it came from."""
        answers = self.attempt(function, *arguments)
        for rank, answer in enumerate(answers):
            if isinstance(answer, Exception):
                where = getattr(answer, "where", "")
                raise AssertionError(f"rank {rank}: {answer!r}\n{where}") from answer
        return answers

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each rank returns or raises; `GoneError` for one that is no more."""
        for connection in self._connections:
            connection.send_bytes(pickle.dumps((sys.path, function.__module__)))
            connection.send_bytes(pickle.dumps((function, arguments)))
        return [_answer(connection) for connection in self._connections]

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()


class Worlds:
    """Makes worlds; a context manager."""

    def __enter__(self) -> Worlds:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._worlds: dict[int, World] = {}
        self._made = 0
        self._listener = Listener(str(Path(self._folder.name) / "socket"), "AF_UNIX", backlog=16)
        source = str(Path(lottery_tickets.__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, __file__, self._listener.address],
            stdin=subprocess.PIPE,
            env={
                **os.environ,
                **{"PYTHONPATH": source, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            },
        )
        return self

    def __exit__(self, *_: object) -> None:
        for world in self._worlds.values():
            world.close()
        self._process.stdin.close()
        self._process.wait()
        self._listener.close()
        self._folder.cleanup()

    def __call__(self, size: int) -> World:
        """The world of this size that lasts."""
        if size not in self._worlds:
            self._worlds[size] = self._make(size)
        return self._worlds[size]

    @contextmanager
    def own(self, size: int) -> Iterator[World]:
        """A world for one test."""
        world = self._make(size)
        try:
            yield world
        finally:
            world.close()

    def _make(self, size: int) -> World:
        self._made += 1
        meeting = Path(self._folder.name) / f"store{self._made}"
        self._process.stdin.write(f"{size} {meeting}\n".encode())
        self._process.stdin.flush()
        connections: list[Any] = [None] * size
        for _ in range(size):
            connection = self._listener.accept()
            connections[connection.recv()] = connection
        return World(connections)


def _answer(connection: Connection) -> Any:
    try:
        if not connection.poll(_PATIENCE_SECONDS):
            raise TimeoutError(f"a rank said nothing for {_PATIENCE_SECONDS} s")
        return pickle.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return GoneError()


# --- In the processes ---


def _serve(address: str) -> None:
    """Fork worlds of ranks, each line of the input saying how many and where they meet."""
    for line in sys.stdin:
        size, meeting = line.split()
        for rank in range(int(size)):
            if os.fork() == 0:
                _be_rank(rank, int(size), meeting, address)
                os._exit(0)


def _be_rank(rank: int, size: int, meeting: str, address: str) -> None:
    import torch.distributed as dist

    # The input is the server's alone, or the file would stay open when it ends.
    os.close(0)
    connection = Client(address, "AF_UNIX")
    connection.send(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=_GROUP_TIMEOUT
    )
    while True:
        try:
            sys.path[:], _ = pickle.loads(connection.recv_bytes())
            order = connection.recv_bytes()
        except (EOFError, ConnectionError):
            return
        connection.send_bytes(_obey(rank, order))


def _obey(rank: int, order: bytes) -> bytes:
    try:
        function, arguments = pickle.loads(order)
        return pickle.dumps(function(rank, *arguments))
    except Exception as error:
        error.where = traceback.format_exc()
        error.__cause__ = error.__context__ = None
        try:
            return pickle.dumps(error)
        except Exception:  # an error of another library that does not pickle
            told = RuntimeError(f"{type(error).__name__}: {error}")
            told.where = error.where
            return pickle.dumps(told)


if __name__ == "__main__":
    import signal

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the ranks that end are nobody's to wait for
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.fsdp
    import torch.distributed.tensor.parallel

    import lottery_tickets.large_models
    from lottery_tickets import create_magnitude_mask

    torch.set_num_threads(1)
    for dtype in (torch.bfloat16, torch.float32):  # compiled kernels are read from disk once, for all
        create_magnitude_mask({"w": torch.arange(64, dtype=dtype)}, 0.5)
    _serve(sys.argv[1])
    os._exit(0)  # nothing to tidy up, and torch takes seconds to
