"""What memory is free: on a device, in this machine, in this process's groups and limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

_ROOT = Path("/")
_PROCESS = "process limit (RLIMIT_{})"


@dataclass(frozen=True)
class FreeMemory:
    """The tightest of several limits.

    Attributes:
        bytes: Free before it.
        limit: Which one it is, in words.
    """

    bytes: int
    limit: str


def free_memory(device: torch.device | str = "cpu") -> FreeMemory | None:
    """Bytes that an operation may still take where it computes; None where the system does not say.

    For "cpu" the least of: memory available without swapping, what memory control groups (v1 and v2, of this
    process and all above it) leave besides file pages that the kernel drops on demand, and what RLIMIT_AS and
    RLIMIT_DATA leave of this process's own. For an accelerator: what its driver calls free, and what torch's
    allocator holds without using.

    Args:
        device: Where the operation computes.

    Returns:
        The tightest limit and its name.

    Example:
        >>> from lottery_tickets.planning import free_memory
        >>> free_memory().bytes > 0
        True
    """
    device = torch.device(device)
    if device.type != "cpu":
        return _free_on(device)
    return min([_available(), *_of_groups(_ROOT), *_of_process()], key=lambda one: one.bytes)


def _free_on(device: torch.device) -> FreeMemory | None:
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    free, _ = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return FreeMemory(free + held, f"memory of {device}")


def _available() -> FreeMemory:
    import psutil

    return FreeMemory(int(psutil.virtual_memory().available), "memory of this machine")


# --- Limits of this process ---


def _of_process() -> list[FreeMemory]:
    try:
        import resource
    except ImportError:  # Windows has none
        return []
    used = _used_by_process()
    limits = {"AS": resource.RLIMIT_AS, "DATA": resource.RLIMIT_DATA}
    soft = {name: resource.getrlimit(kind)[0] for name, kind in limits.items()}
    return [
        FreeMemory(max(0, soft[name] - used[name]), _PROCESS.format(name))
        for name in limits
        if soft[name] != resource.RLIM_INFINITY and name in used
    ]


def _used_by_process() -> dict[str, int]:
    """What the kernel counts against each limit."""
    fields = {"VmSize": "AS", "VmData": "DATA"}
    found = {}
    for line in _lines(Path("/proc/self/status")):
        name, _, rest = line.partition(":")
        if name in fields:
            found[fields[name]] = int(rest.split()[0]) * 1024
    return found


# --- Control groups ---


def _of_groups(root: Path) -> list[FreeMemory]:
    """Limits of the memory groups that this process is in, of either version.

    Args:
        root: Of the file system; another one in tests.
    """
    found = []
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            found += _walked(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            found += _walked(root / "sys/fs/cgroup/memory", path, *names)
    return found


def _walked(mount: Path, path: str, limit: str, usage: str, droppable: str) -> list[FreeMemory]:
    """A group and those above it; a container may see its own at the mount, whatever its path."""
    found = []
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        group = mount.joinpath(*parts[:depth])
        most, used = _number(group / limit), _number(group / usage)
        if most is not None and used is not None:
            dropped = _statistic(group / "memory.stat", droppable)
            name = "/" + "/".join(parts[:depth])
            found.append(FreeMemory(max(0, most - max(0, used - dropped)), f"control group {name}"))
    return found


def _number(path: Path) -> int | None:
    """None where there is no file or no limit."""
    text = "".join(_lines(path))
    return int(text) if text.isdigit() else None


def _statistic(path: Path, name: str) -> int:
    pairs = (line.split() for line in _lines(path))
    return next((int(pair[1]) for pair in pairs if pair[0] == name), 0)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux, or not mounted here
        return []
