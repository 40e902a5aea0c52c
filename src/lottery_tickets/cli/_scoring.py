"""Scores of a model from a text, and the files they are kept in."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lottery_tickets.cli._calibration import Excerpt
from lottery_tickets.cli._criteria import CRITERIA, Criterion, compute_scores, criterion_of
from lottery_tickets.errors import ScoreFileError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lottery_tickets.cli._shell import Session

Scores = Mapping[str, "torch.Tensor"]


@dataclass(frozen=True)
class Calibration:
    """Text to compute scores from.

    Attributes:
        path: UTF-8 text.
        samples: Sequences.
        context: Tokens per sequence.
        batch_size: Sequences that go through the model together.
        seed: Of criteria that draw at random.
        start: First character.
        stop: Character to end before.
    """

    path: Path
    samples: int
    context: int
    batch_size: int
    seed: int = 0
    start: int = 0
    stop: int | None = None

    @property
    def excerpt(self) -> Excerpt:
        """Where its windows lie."""
        return Excerpt(self.path, self.context, self.samples, self.start, self.stop)

    def described(self) -> dict[str, str]:
        """What scores and tickets say of it; without the path, which is of this machine."""
        return {
            "calibration": self.path.name,
            "samples": str(self.samples),
            "context": str(self.context),
            "calibration_start": str(self.start),
            "seed": str(self.seed),
        }


@dataclass(frozen=True)
class Scored:
    """Scores and where they come from.

    Attributes:
        criterion: Its name and how its scores rank.
        scores: By canonical parameter name.
        metadata: All that is known of them.
    """

    criterion: Criterion
    scores: Scores
    metadata: Mapping[str, str]

    @property
    def origin(self) -> dict[str, str]:
        """What a ticket says of the scores it was drawn from: all but what it says of itself."""
        return {key: text for key, text in self.metadata.items() if key not in ("base_model", "weights_digest")}


def score_model(
    session: Session,
    model: nn.Module,
    folder: Path,
    criterion: Criterion,
    calibration: Calibration | None,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Scored:
    """Scores of a criterion that has a scorer.

    Raises:
        EvaluationError: A text with too few tokens, or windows longer than the model has positions for.
    """
    from lottery_tickets.cli._arguments import check_context
    from lottery_tickets.large_models import load_tokenizer

    batches: list[dict[str, torch.Tensor]] = []
    if calibration is not None:
        check_context(model, calibration.context)
        batches = calibration.excerpt.batches(load_tokenizer(folder), calibration.batch_size)
        session.note(
            f"{criterion.name}: scoring by {calibration.samples} sequences of {calibration.context} tokens"
        )
    began = time.perf_counter()
    scores = compute_scores(
        *(criterion, model, batches),
        include=include,
        exclude=exclude,
        seed=calibration.seed if calibration else 0,
        progress=session.progress,
    )
    session.note(f"{criterion.name}: scored in {time.perf_counter() - began:.1f} s")
    computed = str(next(model.parameters()).dtype).removeprefix("torch.")
    described = calibration.described() if calibration else {}
    return Scored(criterion, scores, {"criterion": criterion.name, "computed_in": computed, **described})


def read_scored(path: Path) -> Scored:
    """Scores from a file.

    Raises:
        ScoreFileError: A file of another kind, or of a criterion that is not known here.
    """
    from lottery_tickets._score_files import read_scores

    scores, metadata = read_scores(path)
    name = metadata.get("criterion", "")
    try:
        criterion = criterion_of(name)
    except typer.BadParameter as error:
        raise ScoreFileError(
            f"{path}: criterion {name!r} is not known here, so neither is which of its scores are to stay; known "
            f"are {', '.join(CRITERIA)}."
        ) from error
    return Scored(criterion, scores, metadata)
