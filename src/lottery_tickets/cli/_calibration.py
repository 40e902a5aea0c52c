"""Text that scores are computed from, kept apart from text that tickets are judged by."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lottery_tickets.errors import EvaluationError

if TYPE_CHECKING:
    import torch

SamplesOption = Annotated[
    int, typer.Option("--samples", min=1, help="Sequences of the calibration text to compute scores from.")
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Sequences that go through the model together.")
]


@dataclass(frozen=True)
class Excerpt:
    """Windows of a text.

    Attributes:
        path: UTF-8 text.
        context: Tokens per window.
        count: How many windows; None for all that fit.
        start: First character.
        stop: Character to end before; None for the end of the text.
    """

    path: Path
    context: int
    count: int | None
    start: int = 0
    stop: int | None = None

    def windows(self, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
        """The windows, as batches of one row."""
        from lottery_tickets.cli._windows import text_windows

        return text_windows(tokenizer, self.path, self.context, count=self.count, start=self.start, stop=self.stop)

    def batches(self, tokenizer: Any, size: int) -> list[dict[str, torch.Tensor]]:
        """All windows asked for, so many to a batch.

        Raises:
            EvaluationError: The text has fewer.
        """
        windows = self.windows(tokenizer)
        if self.count is not None and len(windows) < self.count:
            before = "" if self.stop is None else f" and before {self.stop}, where the test text begins"
            raise EvaluationError(
                f"{self.path}: {len(windows)} sequences of {self.context} tokens after character "
                f"{self.start}{before}; --samples {self.count} asks for more."
            )
        return list(_together(windows, size))


def kept_apart(calibration: Excerpt, test: Excerpt) -> tuple[Excerpt, Excerpt]:
    """The same excerpts, the earlier one ending where the later one begins if they come from one file.

    Raises:
        EvaluationError: Both begin at the same character of one file.
        FileNotFoundError: No such file.
    """
    if not calibration.path.samefile(test.path):
        return calibration, test
    if calibration.start == test.start:
        raise EvaluationError(
            f"{test.path}: calibration text and test text both begin at character {test.start}, so tickets would "
            "be judged by what they were drawn from. Move one with --start or --calibration-start."
        )
    if calibration.start < test.start:
        return _ending(calibration, test.start), test
    return calibration, _ending(test, calibration.start)


def _ending(excerpt: Excerpt, stop: int) -> Excerpt:
    return Excerpt(excerpt.path, excerpt.context, excerpt.count, excerpt.start, stop)


def _together(windows: Iterable[dict[str, torch.Tensor]], size: int) -> Iterator[dict[str, torch.Tensor]]:
    import torch

    rows = [window["input_ids"] for window in windows]
    for first in range(0, len(rows), size):
        yield {"input_ids": torch.cat(rows[first : first + size])}
