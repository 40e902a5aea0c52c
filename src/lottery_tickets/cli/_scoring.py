"""Scores of a model from a text, and the files they are kept in."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from lottery_tickets.cli._calibration import Excerpt
from lottery_tickets.cli._computing import Computing
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
        start: First character.
        stop: Character to end before.
    """

    path: Path
    samples: int
    context: int
    batch_size: int
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
            "batch_size": str(self.batch_size),
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
    model: nn.Module | Path,
    folder: Path,
    criterion: Criterion,
    calibration: Calibration | None,
    how: Computing,
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
        *(criterion, model, batches, how),
        include=include,
        exclude=exclude,
        progress=session.progress,
    )
    session.note(f"{criterion.name}: scored in {time.perf_counter() - began:.1f} s")
    first = how.dtype if isinstance(model, Path) else next(model.parameters()).dtype
    computed = str(first).removeprefix("torch.")
    described = {"criterion": criterion.name, "computed_in": computed, **how.described(criterion)}
    if calibration:
        described |= {**calibration.described(), "seed": str(how.seed)}
    return Scored(criterion, scores, described)


def score_into(
    path: Path,
    origin: Mapping[str, str],
    session: Session,
    model: nn.Module | Path,
    folder: Path,
    criterion: Criterion,
    calibration: Calibration | None,
    how: Computing,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> Scored:
    """Scores that are written to a file; those made on disk are made in that very file, and stay mapped.

    Args:
        path: The file; it appears whole or not at all.
        origin: What the file says of the model.
        session: See `score_model`, as are the others.
        model: See there.
        folder: See there.
        criterion: See there.
        calibration: See there.
        how: See there.
        include: See there.
        exclude: See there.
    """
    from lottery_tickets._atomic import replacing
    from lottery_tickets._score_files import label_scores, read_scores, write_scores

    summed_there = how.store == "disk" and criterion.by_gradients and not criterion.members
    if not summed_there and not how.from_disk:
        scored = score_model(
            *(session, model, folder, criterion, calibration, how), include=include, exclude=exclude
        )
        write_scores(path, scored.scores, {**origin, **scored.metadata})
        return scored
    with replacing(path) as file:
        scored = score_model(
            *(session, model, folder, criterion, calibration, replace(how, store=file)),
            include=include,
            exclude=exclude,
        )
        label_scores(file, {**origin, **scored.metadata})
    return replace(scored, scores=read_scores(path)[0])


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
