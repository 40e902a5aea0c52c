"""The folder of a run: one owner, one configuration, the newest whole state, and the measurements so far.

    lock              held by the process that runs, for as long as it lives
    config.json       what the run was started with
    metrics.jsonl     a line for each measurement
    state-00000007/   the newest whole state: state.json and safetensors files
    NAME/             what is kept to the end, written once, in the form of a state

A state is written beside the others under a temporary name, synced and renamed; only then does the one before it
go. So whatever the moment at which the process ends, the folder holds a whole state or none, and lines of
measurements that are newer than it, which are cut off when the folder is opened again.

Several processes that work on one run share its folder: rank 0 owns it and writes, the others read, and nobody
goes on before a write is done.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lottery_tickets._atomic import creating_folder, replacing
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import RunFolderError
from lottery_tickets.runs._encoding import Json
from lottery_tickets.runs._files import Written, write_tensors
from lottery_tickets.runs._lock import locked

_log = logging.getLogger(__name__)

FORMAT = "lottery_tickets.run"
FORMAT_VERSION = "1"

_CONFIG, _METRICS, _STATE = "config.json", "metrics.jsonl", "state.json"
_STATES = "state-"


@dataclass(frozen=True)
class State:
    """A whole state on disk.

    Attributes:
        folder: Where it lies.
        values: What was saved as JSON.
        lines: Measurements made before it.
    """

    folder: Path
    values: dict[str, Any]
    lines: int

    @property
    def number(self) -> int:
        """How many were saved before it in this run."""
        return int(self.folder.name.removeprefix(_STATES))

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """The tensors of one file, on the CPU, mapped from it where the platform can."""
        path = self.folder / f"{group}.safetensors"
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
        except (SafetensorError, FileNotFoundError) as error:
            raise RunFolderError(
                f"{path}: damaged or missing ({error}). The run cannot go on; start anew in another folder."
            ) from error


class RunFolder:
    """A folder that this process, or rank 0 of several, owns until the block ends; made by `RunFolder.open`.

    Attributes:
        path: The folder.
        state: The newest whole state, None in a run that has saved none.
        lines: The measurements up to it, and those recorded since.
        writes: Whether this process writes in it; the others make the same calls, which wait until it is done.
        ranks: The processes that work on the run.
    """

    def __init__(self, path: Path, state: State | None, lines: list[dict[str, Any]], ranks: Ranks) -> None:
        self.path = path
        self.state = state
        self.lines = lines
        self.writes = ranks.first
        self.ranks = ranks

    @classmethod
    @contextmanager
    def open(
        cls,
        path: str | os.PathLike[str],
        configuration: Mapping[str, Any],
        *,
        resume: bool = True,
        ranks: Ranks | None = None,
    ) -> Iterator[RunFolder]:
        """Take possession of a folder, made if it is not there; what killed writes left in it is removed.

        Args:
            path: The folder.
            configuration: What the run's outcome depends on, as JSON. A folder is one run's.
            resume: If False, a folder that holds a state already is refused.
            ranks: Processes that work on the run together, all of which see the folder; None for this one alone.

        Yields:
            The folder, its `state` being where to go on from.

        Raises:
            RunFolderError: In use by another process, of another configuration (each key that differs is named
                with both values), damaged, not writable, or with a state though `resume` is False.

        Example:
            >>> import torch
            >>> from lottery_tickets.runs import RunFolder
            >>> with RunFolder.open("run", {"seed": 0}) as run:
            ...     run.record({"epoch": 1})
            ...     run.save({"epoch": 1}, {"model": {"w": torch.ones(2)}})
            >>> with RunFolder.open("run", {"seed": 0}) as run:
            ...     run.lines, run.state.values, run.state.tensors("model")["w"]
            ([{'epoch': 1}], {'epoch': 1}, tensor([1., 1.]))
        """
        folder, ranks = Path(path), ranks or Ranks()
        if ranks.first:
            _make(folder)
        with locked(folder) if ranks.first else nullcontext():
            state: State | None = None
            lines: list[dict[str, Any]] = []
            if ranks.first:
                state, lines = _taken(folder, configuration, resume=resume)
            newest = ranks.gather(None if state is None else state.folder.name)[0]
            if newest is not None and not ranks.first:
                state, lines = _seen(folder, newest)
            yield cls(folder, state, lines, ranks)

    @staticmethod
    def configuration(path: str | os.PathLike[str]) -> dict[str, Any]:
        """What the run in a folder was started with; the folder may be in use.

        Raises:
            RunFolderError: There is no run, or one of an unknown format.
        """
        return _configuration_in(Path(path) / _CONFIG)

    def record(self, line: Mapping[str, Any]) -> None:
        """Add a measurement: it is on disk when this returns, and counts once a state is saved after it."""
        text = json.dumps(line) + "\n"
        if self.writes:
            try:
                with (self.path / _METRICS).open("a", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                raise self._unwritten("a measurement", error) from error
        self.lines.append(json.loads(text))

    def save(self, values: Mapping[str, Json], tensors: Mapping[str, Mapping[str, Written]]) -> None:
        """Write a whole state and remove the one before it.

        Args:
            values: As JSON.
            tensors: File name, without its ending, to named tensors, which pass through memory one at a time if
                they are not there already; the same names on all processes.

        Raises:
            RunFolderError: It could not be written, for want of room for instance; the state before it is whole.
            DistributedError: Another process failed or has gone.
        """
        before = self.state
        name = f"{_STATES}{0 if before is None else before.number + 1:08d}"
        self.state = self._written(name, "the state", values, tensors)
        if before is not None and self.writes:
            shutil.rmtree(before.folder)

    def keep(self, name: str, values: Mapping[str, Json], tensors: Mapping[str, Mapping[str, Written]]) -> State:
        """Write what is to stay to the end of the run; as `save`, but beside the states, under a name.

        Written again it takes the place of what an earlier process, killed before its next state, had kept.
        """
        if self.writes and (self.path / name).exists():
            shutil.rmtree(self.path / name)
        return self._written(name, f"what is kept as {name}", values, tensors)

    def kept(self, name: str) -> State:
        """What `keep` wrote.

        Raises:
            RunFolderError: It is not there, or damaged.
        """
        return _state_in(self.path / name)

    def _written(
        self,
        name: str,
        what: str,
        values: Mapping[str, Json],
        tensors: Mapping[str, Mapping[str, Written]],
    ) -> State:
        folder, content = self.path / name, {"lines": len(self.lines), "values": values}
        creating: AbstractContextManager[Path | None]
        try:
            creating = creating_folder(folder) if self.writes else nullcontext()
            with creating as temporary:
                for group, named in tensors.items():
                    write_tensors(named, temporary and temporary / f"{group}.safetensors")
                if temporary is not None:
                    (temporary / _STATE).write_text(json.dumps(content), encoding="utf-8")
        except OSError as error:
            raise self._unwritten(what, error) from error
        self.ranks.gather(None)  # to wait for
        return State(folder, json.loads(json.dumps(values)), len(self.lines))

    def _unwritten(self, what: str, error: Exception) -> RunFolderError:
        last = "no state yet" if self.state is None else f"the whole state {self.state.folder.name}"
        return RunFolderError(
            f"{self.path}: {what} could not be written ({error}). The folder holds {last}; make room and call "
            "again, and the run goes on from there."
        )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{folder}: no folder can be made there ({error}); give another run_dir.") from error


def _taken(
    folder: Path, configuration: Mapping[str, Any], *, resume: bool
) -> tuple[State | None, list[dict[str, Any]]]:
    """Where to go on from in a folder that is locked, tidied up for it."""
    _remove_remains(folder)
    _claim(folder, json.loads(json.dumps(configuration)))
    state = _newest_state(folder)
    if state is not None and not resume:
        raise RunFolderError(
            f"{folder} holds a run already. With resume=True it goes on; to start anew give another "
            "run_dir, or remove the folder."
        )
    lines = _cut_lines(folder / _METRICS, 0 if state is None else state.lines)
    if state is not None:
        _log.info("%s: going on from %s, after %d measurements", folder, state.folder.name, len(lines))
    return state, lines


def _seen(folder: Path, newest: str) -> tuple[State, list[dict[str, Any]]]:
    """The same as another process sees it."""
    if not (folder / newest).is_dir():
        raise RunFolderError(
            f"{folder}: rank 0 goes on from {newest} there, which this process does not see. Give a run_dir on a "
            "file system that all ranks share."
        )
    state = _state_in(folder / newest)
    kept = (folder / _METRICS).read_bytes().splitlines()[: state.lines] if state.lines else []
    return state, [json.loads(line) for line in kept]


def _remove_remains(folder: Path) -> None:
    """What writes that were killed have left: temporary files and folders, states that have a newer one."""
    abandoned = [path for path in folder.glob(".*.tmp") if path.is_dir()]
    for path in (*abandoned, *_state_folders(folder)[:-1]):
        shutil.rmtree(path)
    for path in (*folder.glob(f".{_CONFIG}.*.tmp"), *folder.glob("*/.*.safetensors.*.tmp")):
        path.unlink()


def _state_folders(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path for path in folder.glob(f"{_STATES}*") if path.name.removeprefix(_STATES).isdecimal())


def _claim(folder: Path, configuration: dict[str, Any]) -> None:
    """Write the configuration, or compare it with the one of the states that are there."""
    path, states = folder / _CONFIG, _state_folders(folder)
    if not states or not path.exists():
        if states:
            raise RunFolderError(
                f"{path} is missing, so the states beside it belong to an unknown run; move them away."
            )
        content = {"format": FORMAT, "format_version": FORMAT_VERSION, "configuration": configuration}
        try:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise RunFolderError(
                f"{path} cannot be written ({error}); make room, or give another run_dir."
            ) from error
        return
    there = _configuration_in(path)
    different = [
        f"{key}: {_value(there, key)} there, {_value(configuration, key)} now"
        for key in (*configuration, *(key for key in there if key not in configuration))
        if _value(there, key) != _value(configuration, key)
    ]
    if different:
        raise RunFolderError(
            f"{folder} holds a run of another configuration: {'; '.join(different)}. Call it as it was called "
            "before, or give another run_dir."
        )


def _configuration_in(path: Path) -> dict[str, Any]:
    """What a run was started with, of a format that is known here."""
    found = _read_json(path)
    if found.get("format") != FORMAT or found.get("format_version") != FORMAT_VERSION:
        raise RunFolderError(
            f"{path}: format {found.get('format')!r}, version {found.get('format_version')!r}; this library reads "
            f"{FORMAT!r}, version {FORMAT_VERSION!r}. Give another run_dir."
        )
    configuration: dict[str, Any] = found["configuration"]
    return configuration


def _value(configuration: Mapping[str, Any], key: str) -> str:
    return json.dumps(configuration[key]) if key in configuration else "nothing"


def _newest_state(folder: Path) -> State | None:
    folders = _state_folders(folder)
    if not folders:
        return None
    return _state_in(folders[-1])


def _state_in(folder: Path) -> State:
    content = _read_json(folder / _STATE)
    return State(folder, content["values"], content["lines"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}). Start anew in another folder.") from error
    if not isinstance(content, dict):
        raise RunFolderError(f"{path}: not what a run writes there. Start anew in another folder.")
    return content


def _cut_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The first lines of a file, of which the others are cut off."""
    if not path.exists():
        kept: Sequence[bytes] = []
    else:
        with path.open("rb+") as file:
            kept = file.read().splitlines(keepends=True)[:count]
            file.truncate(sum(len(line) for line in kept))
            os.fsync(file.fileno())
    if len(kept) < count:
        raise RunFolderError(
            f"{path}: {len(kept)} lines, but the state beside it was saved after {count}. Start anew elsewhere."
        )
    return [json.loads(line) for line in kept]
