"""A folder that gathers under another name and appears when it is whole, however often the work is interrupted."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lottery_tickets._atomic import move, replacing
from lottery_tickets.errors import CheckpointError

_log = logging.getLogger(__name__)

_JOB = "job.json"
_FILES = "files"


class Gathering:
    """Files of a folder to be, each of which is there whole or not at all.

    Args:
        folder: Where they gather.
        sizes: Name, relative to the folder, to bytes of every file that there will be.
    """

    def __init__(self, folder: Path, sizes: Mapping[str, int]) -> None:
        self.folder = folder
        self._sizes = sizes

    def missing(self) -> list[str]:
        """Names of the files that are not there yet."""
        return [name for name, size in self._sizes.items() if not _has_size(self.folder / name, size)]

    @contextmanager
    def adding(self, name: str) -> Iterator[Path]:
        """Give a temporary name; on success the file is synced to disk and is there."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as temporary:
            yield temporary


@contextmanager
def gathering(output: Path, job: Mapping[str, str], sizes: Mapping[str, int]) -> Iterator[Gathering]:
    """Gather files beside `output`; on success they become it, otherwise those that are whole wait for next time.

    They wait in `.NAME.partial`. What is found there goes on if it belongs to an equal job, and is thrown away if
    it belongs to another.

    Args:
        output: The folder to make; it must not exist.
        job: What makes the files what they are.
        sizes: Name, relative to the folder, to bytes of every file that there will be.

    Raises:
        CheckpointError: `output` exists, too little room on its disk, or a folder in the way.
    """
    if os.path.lexists(output):
        raise CheckpointError(
            f"{output} exists already; nothing is overwritten: name another folder or remove it."
        )
    waiting = output.parent / f".{output.name}.partial"
    _throw_away_of_another_job(waiting, job)
    gathered = Gathering(waiting / _FILES, sizes)
    missing = gathered.missing()
    _check_room(output, sum(sizes[name] for name in missing))
    if len(missing) < len(sizes):
        _log.info("%s: %d of %d files are there already", waiting, len(sizes) - len(missing), len(sizes))
    gathered.folder.mkdir(parents=True, exist_ok=True)
    with replacing(waiting / _JOB) as temporary:
        temporary.write_text(json.dumps(job), encoding="utf-8")
    try:
        yield gathered
    except BaseException:
        _leave(gathered, waiting)
        raise
    move(gathered.folder, output)
    shutil.rmtree(waiting)


def _throw_away_of_another_job(waiting: Path, job: Mapping[str, str]) -> None:
    if not os.path.lexists(waiting) or _has_just_begun(waiting):
        return
    try:
        found = json.loads((waiting / _JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.keys() != job.keys():
        raise CheckpointError(f"{waiting} is in the way, and is not an unfinished copy of ours; move it.")
    if found != job:
        _log.warning("%s was left by another mask or other weights; starting anew", waiting)
        shutil.rmtree(waiting)
    for half_written in waiting.rglob(".*.tmp"):
        half_written.unlink()


def _has_just_begun(waiting: Path) -> bool:
    """Whether this is a folder of ours that was not yet told what it is for."""
    return waiting.is_dir() and all(
        path.name == _FILES or path.name.startswith(f".{_JOB}.") for path in waiting.rglob("*")
    )


def _check_room(output: Path, needed: int) -> None:
    disk = next(parent for parent in output.absolute().parents if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise CheckpointError(
            f"{output}: {needed:,} bytes are to be written, and {free:,} are free on that disk. Make room, or "
            "name a folder on another one."
        )


def _leave(gathered: Gathering, waiting: Path) -> None:
    if any(path.is_file() for path in gathered.folder.rglob("*")):
        _log.warning("%s keeps the files that are finished; the same call goes on from there", waiting)
    else:
        shutil.rmtree(waiting, ignore_errors=True)


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size
