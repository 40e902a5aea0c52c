"""A folder beside a Trainer's checkpoints: a state for each check that a checkpoint may go on from.

    checks.jsonl                 a line for each check
    step-00000300/               what the next check depends on: state.json and state.safetensors
    ticket.safetensors           once the mask has settled

A state is there before any checkpoint of its step or a later one is written. So whichever checkpoint is gone on
from, and whenever the process was killed, the newest state that is not newer than it is the right one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lottery_tickets._atomic import creating_folder, replacing
from lottery_tickets.errors import RunFolderError

_LINES, _VALUES, _TENSORS = "checks.jsonl", "state.json", "state.safetensors"
_STATE = "step-"


class StateFolder:
    """States of the checks of one run, by optimizer step.

    Args:
        path: Made when something is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def clear(self, *others: str) -> None:
        """Begin anew: all states go, and files of these names."""
        for state in self._states().values():
            shutil.rmtree(state)
        for name in (_LINES, *others):
            (self.path / name).unlink(missing_ok=True)

    def write(self, step: int, line: dict[str, Any], values: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Write down a check and the state after it.

        Raises:
            RunFolderError: There is one of this step already.
        """
        folder = self.path / f"{_STATE}{step:08d}"
        if folder.exists():
            raise RunFolderError(f"{folder} is there already; give each callback a folder of its own.")
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LINES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        with creating_folder(folder) as temporary:
            save_file(tensors, temporary / _TENSORS)
            (temporary / _VALUES).write_text(json.dumps(values), encoding="utf-8")

    def read(self, step: int) -> tuple[Any, dict[str, torch.Tensor], list[dict[str, Any]]] | None:
        """The newest state that is not newer than a step, and the lines up to it; None where there is none.

        Later ones are of a run that is not gone on with, and are removed.
        """
        states = self._states()
        for late in [one for one in states if one > step]:
            shutil.rmtree(states.pop(late))
        for remains in self.path.glob(f".{_STATE}*.tmp"):  # a write that was killed
            shutil.rmtree(remains)
        if not states:
            return None
        newest = max(states)
        try:
            values = json.loads((states[newest] / _VALUES).read_text(encoding="utf-8"))
            tensors = load_file(states[newest] / _TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise RunFolderError(
                f"{states[newest]}: damaged ({error}). Remove it, and the checks begin anew from the step of the "
                "state before it."
            ) from error
        return values, tensors, self._cut_lines(newest)

    def keep_for(self, checkpoints: Iterable[int]) -> None:
        """Remove the states that none of these checkpoints, and none to come, would go on from."""
        states = self._states()
        before = [[one for one in states if one <= checkpoint] for checkpoint in checkpoints]
        needed = {max(states, default=0), *(max(steps) for steps in before if steps)}
        for step, folder in states.items():
            if step not in needed:
                shutil.rmtree(folder)

    def _states(self) -> dict[int, Path]:
        found = {path.name.removeprefix(_STATE): path for path in self.path.glob(f"{_STATE}*") if path.is_dir()}
        return {int(step): path for step, path in found.items() if step.isdecimal()}

    def _cut_lines(self, step: int) -> list[dict[str, Any]]:
        """The lines of checks up to a step; what came after, or was cut off by a kill, goes from the file."""
        path = self.path / _LINES
        kept = []
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                break
            if line["step"] > step:
                break
            kept.append(line)
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        return kept
