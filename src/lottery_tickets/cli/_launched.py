"""A command that a launcher (torchrun, accelerate) started several times: one job, told of once."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lottery_tickets.errors import DistributedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def launched() -> bool:
    """Whether this process is one of several, as torch's launchers tell it by the environment."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return not launched() or os.environ["RANK"] == "0"


def launcher() -> str | None:
    """What the user typed before the arguments of this command, a launcher and its options.

    None where the process above this one is none that ends with the same arguments.
    """
    import psutil

    own = sys.argv[1:]
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it has ended, or does not tell
        return None
    before = words[: -len(own)] if own else []
    if not before or words[-len(own) :] != own:
        return None
    if len(before) > 1 and Path(before[1]).is_file() and os.access(before[1], os.X_OK):
        before = before[1:]  # a script, which is started by its own name
    name = Path(before[0]).name
    return shlex.join([name if shutil.which(name) == before[0] else before[0], *before[1:]])


@contextmanager
def process_group(command: str, *, possible: bool) -> Iterator[ProcessGroup | None]:
    """All processes of the job, or None for a process alone; errors of one are errors of all inside the block.

    Args:
        command: Its name, for messages.
        possible: Whether it works on several ranks.

    Raises:
        DistributedError: It does not, or another rank failed.
    """
    if not launched():
        yield None
        return
    if not possible:
        raise DistributedError(f"{command} runs in one process; call it without torchrun.")
    import torch
    import torch.distributed as dist

    from lottery_tickets._ranks import Ranks

    began = not dist.is_initialized()
    if began:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend)
    try:
        with Ranks.world().together():
            yield dist.group.WORLD
    finally:
        if began:
            dist.destroy_process_group()
