"""Files of importance scores: one safetensors file, a float32 tensor per parameter and where they come from."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lottery_tickets._atomic import replacing
from lottery_tickets.errors import ScoreFileError

_log = logging.getLogger(__name__)

FORMAT = "lottery_tickets.scores"
FORMAT_VERSION = "1"
_RESERVED = ("format", "format_version", "library_version")
_ALIGNMENT = 64  # bytes; what the header grows by is a multiple, so that tensors lie as well as they did
_BLOCK = 1 << 23


def write_scores(
    path: str | os.PathLike[str], scores: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write scores under a temporary name and rename it.

    Args:
        path: The file; one that exists is replaced.
        scores: Canonical parameter name to scores.
        metadata: What to know about them, such as "criterion" and "weights_digest".

    Example:
        >>> import torch
        >>> from lottery_tickets._score_files import read_scores, write_scores
        >>> write_scores("fisher.safetensors", {"fc.weight": torch.ones(2, 2)}, {"criterion": "fisher"})
        >>> read_scores("fisher.safetensors")
        ({'fc.weight': tensor([[1., 1.],
                [1., 1.]])}, {'criterion': 'fisher'})
    """
    with replacing(path) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in scores.items()},
            temporary,
            _header(metadata),
        )
    _log.info("wrote %s: scores of %d tensors", path, len(scores))


def label_scores(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    """Say in a safetensors file that its tensors are scores, and what to know about them, as `write_scores` does.

    The file is changed in place: its data moves on by what the header grows, in blocks, so tensors that are mapped
    from it are to be mapped anew.

    Args:
        path: Float32 tensors, such as the library's `store=path` leaves.
        metadata: What to know about them.
    """
    with Path(path).open("r+b") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(start - 8))
        text = json.dumps({"__metadata__": _header(metadata), **entries}).encode()
        text += b" " * (-(len(text) + 8 - start) % _ALIGNMENT)
        _move(file, start, 8 + len(text))
        file.seek(0)
        file.write(len(text).to_bytes(8, "little") + text)


def _move(file: BinaryIO, start: int, target: int) -> None:
    """Move what stands behind one place of a file behind a later one, the end first."""
    end = file.seek(0, os.SEEK_END)
    for first in reversed(range(start, end, _BLOCK)):
        file.seek(first)
        block = file.read(min(_BLOCK, end - first))
        file.seek(first - start + target)
        file.write(block)


def _header(metadata: Mapping[str, str]) -> dict[str, str]:
    return {
        **metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": version("lottery-tickets"),
    }


def read_scores(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Scores, mapped from the file where the platform can, and what it says about them.

    Raises:
        ScoreFileError: Not a whole safetensors file, or one that does not hold scores.
        FileNotFoundError: No such file.
    """
    if Path(path).is_dir():
        raise ScoreFileError(f"{path}: a folder, not a file of scores; give the .safetensors file in it.")
    try:
        with safe_open(path, framework="pt") as file:
            header = _checked_header(path, file.metadata())
            scores = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    except SafetensorError as error:
        raise ScoreFileError(
            f"{path}: not a whole safetensors file, truncated or damaged ({error}); compute the scores again."
        ) from error
    return scores, {key: value for key, value in header.items() if key not in _RESERVED}


def _checked_header(path: str | os.PathLike[str], header: Mapping[str, str] | None) -> dict[str, str]:
    found = (header or {}).get("format")
    if header is None or found != FORMAT:
        raise ScoreFileError(
            f"{path}: format is {found!r}, files of scores say {FORMAT!r}; 'lottery-tickets score' writes them."
        )
    if header.get("format_version") != FORMAT_VERSION:
        raise ScoreFileError(
            f"{path}: format version {header.get('format_version')!r} is unknown here, this library reads "
            f"{FORMAT_VERSION!r}; update lottery-tickets."
        )
    return dict(header)
