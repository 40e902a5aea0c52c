"""One process a folder."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lottery_tickets.errors import RunFolderError

_NAME = "lock"

# Record locks keep other processes out, and not this one; worse, closing any descriptor of the file gives the lock
# up. So who holds what within this process is known here. A forked child has a copy, but not the lock.
_guard = threading.Lock()
_held: dict[tuple[int, int], int] = {}


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for the time of the block; the end of the process, however it comes, ends the hold.

    A record lock, and not `flock`, which the workers of a data loader would inherit and hold on to after their
    parent was killed.

    Raises:
        RunFolderError: Held by another process, or by this one, or the platform has no such locks.
    """
    try:
        import fcntl
    except ImportError as error:
        raise RunFolderError(
            f"{folder}: locking a folder needs POSIX file locks, which this platform lacks. Run without run_dir."
        ) from error
    place = folder.stat()
    key, process = (place.st_dev, place.st_ino), os.getpid()
    with _guard:
        if _held.get(key) == process:
            raise RunFolderError(f"{folder} is in use by this process already; give another run_dir.")
        descriptor = _opened(folder)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            if isinstance(error, (BlockingIOError, PermissionError)):  # the two ways to say that it is held
                raise RunFolderError(
                    f"{folder} is in use by process {owner or '(unknown)'}; wait for it, or give another run_dir."
                ) from error
            raise RunFolderError(
                f"{folder}: its file system gives no lock ({error}). Give a run_dir on another one."
            ) from error
        _held[key] = process
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{process}\n".encode(), 0)  # for the message that others get
        yield
    finally:
        with _guard:
            del _held[key]
            os.close(descriptor)


def _opened(folder: Path) -> int:
    try:
        return os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RunFolderError(f"{folder}: cannot be written ({error}); give another run_dir.") from error
