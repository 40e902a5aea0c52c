"""Text as windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lottery_tickets.errors import EvaluationError

_CHARACTERS_PER_TOKEN = 8  # a first guess on the generous side, doubled until there are enough tokens
_PIECE = 1 << 20


def text_windows(
    tokenizer: Any,
    path: Path,
    context: int,
    *,
    count: int | None = None,
    start: int = 0,
    stop: int | None = None,
) -> list[dict[str, torch.Tensor]]:
    """Consecutive windows of a text, as batches of one row for a causal language model.

    Each window opens with what the tokenizer itself puts before a text (Llama's and Gemma's BOS; nothing for
    SmolLM2 and GPT-2). Tokens that do not fill a last window are dropped.

    Args:
        tokenizer: Of transformers.
        path: UTF-8 text.
        context: Tokens per window, at least 2.
        count: At most so many windows; None for the whole text.
        start: Characters to skip at the beginning.
        stop: Character to end before; None for the end of the text.

    Raises:
        EvaluationError: Text that does not fill one window, or is not UTF-8.
        FileNotFoundError: No such file.
    """
    opening = _opening(tokenizer)
    body = context - len(opening)
    needed = None if count is None else count * body
    tokens = _tokens(tokenizer, path, start, stop, needed)
    windows = [
        torch.tensor([opening + tokens[first : first + body]]) for first in range(0, len(tokens) - body + 1, body)
    ]
    if not windows:
        until = "" if stop is None else f" and before {stop}"
        raise EvaluationError(
            f"{path}: {len(tokens)} tokens after character {start}{until}, and one window takes {body}; "
            "use a longer text or a shorter --context."
        )
    return [{"input_ids": window} for window in windows[:count]]


def character_count(path: Path) -> int:
    """Characters of a text, read piece by piece."""
    with path.open(encoding="utf-8") as file:
        return sum(len(piece) for piece in iter(lambda: file.read(_PIECE), ""))


def _opening(tokenizer: Any) -> list[int]:
    bare = tokenizer("a", add_special_tokens=False).input_ids
    dressed: list[int] = tokenizer("a").input_ids
    return dressed[: dressed.index(bare[0])] if bare and bare[0] in dressed else []


def _tokens(tokenizer: Any, path: Path, start: int, stop: int | None, needed: int | None) -> list[int]:
    """Tokens of the text, all of them or at least as many as needed."""
    most = None if stop is None else max(0, stop - start)
    length = None if needed is None else needed * _CHARACTERS_PER_TOKEN
    while True:
        text, ended = _read(path, start, length, most)
        tokens: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        # A token at a cut may differ from the one in the whole text, so some more are asked for.
        if ended or needed is None or len(tokens) > needed + 64:
            return tokens
        assert length is not None
        length *= 2


def _read(path: Path, start: int, length: int | None, most: int | None) -> tuple[str, bool]:
    """So many characters, and whether these are all that there are."""
    wanted = min((limit for limit in (length, most) if limit is not None), default=-1)
    try:
        with path.open(encoding="utf-8") as file:
            file.read(start)
            text = file.read(wanted)
            return text, wanted < 0 or len(text) < wanted or wanted == most
    except UnicodeDecodeError as error:
        raise EvaluationError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from error
