"""What a piece of work costs: seconds, and the most memory it had above what was there before."""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

    from lottery_tickets.planning import MemoryPlan

T = TypeVar("T")

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """What a piece of work took.

    Attributes:
        seconds: On the wall clock.
        host_bytes: How far the resident memory of this process rose at its highest; None where the system does not
            tell (only Linux does).
        device_bytes: The same for what torch holds on the accelerator; None on a CPU.
    """

    seconds: float
    host_bytes: int | None
    device_bytes: int | None


def resident_bytes() -> int:
    """Memory of this process that is resident now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def metered(work: Callable[[], T], device: torch.device) -> tuple[T, Cost]:
    """Result and cost of a piece of work.

    Host memory is the kernel's high-water mark of resident memory (VmHWM), set back to what is resident when the
    work begins; memory that is free but still held is given back first, or reuse of it would not be seen.
    """
    import torch

    cuda = device.type == "cuda"
    resettable = forget_peak()
    host = _high_water()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    began = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    peak = _high_water()
    return result, Cost(
        seconds,
        peak - host if resettable and host is not None and peak is not None else None,
        torch.cuda.max_memory_allocated(device) - before if cuda else None,
    )


@contextmanager
def rehearsing() -> Iterator[None]:
    """A block that does what is to be measured on next to nothing, so that libraries have loaded their code.

    Nobody hears of it, and random states are afterwards what they were.
    """
    from lottery_tickets.runs import private_random_state

    logger = logging.getLogger("lottery_tickets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with private_random_state(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def forget_peak() -> bool:
    """Let the kernel's high-water mark begin anew at what is needed now; whether it does."""
    gc.collect()
    _give_back()
    return _reset_high_water()


def run_memory(plan: MemoryPlan, cost: Cost, folder: Path) -> dict[str, Any]:
    """What a run was planned to take and the most that it took, in the call of it that took most.

    Args:
        plan: Of its training in this call.
        cost: Of this call, which may have found all of it done.
        folder: Of the run, whose results tell of the calls before.
    """
    peak = cost.host_bytes if cost.device_bytes is None else cost.device_bytes
    now = {"plan": plan.as_dict(), "peak_bytes": peak}
    try:
        before: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))["memory"]
        return before if before["peak_bytes"] >= (peak or 0) else now
    except (OSError, ValueError, KeyError, TypeError):  # of no run, or of none that tells
        return now


def _give_back() -> None:
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others hold on to nothing
        if trim is not None:
            trim(0)


def _reset_high_water() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:  # not Linux, or not allowed in this container
        return False
    return True


def _high_water() -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
