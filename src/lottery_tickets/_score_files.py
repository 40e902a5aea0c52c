"""Files of importance scores: one safetensors file, a float32 tensor per parameter and where they come from."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lottery_tickets._atomic import replacing
from lottery_tickets.errors import ScoreFileError

_log = logging.getLogger(__name__)

FORMAT = "lottery_tickets.scores"
FORMAT_VERSION = "1"
_RESERVED = ("format", "format_version", "library_version")


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
    header = {
        **metadata,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "library_version": version("lottery-tickets"),
    }
    with replacing(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in scores.items()}, temporary, header)
    _log.info("wrote %s: scores of %d tensors", path, len(scores))


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
