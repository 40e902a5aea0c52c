"""Criteria beside each other: tickets of one model, judged on the same windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, TypedDict

import torch
from tqdm import tqdm

from lottery_tickets._batches import BatchLoss, evaluating, measure
from lottery_tickets._quality import TicketQuality, ticket_quality
from lottery_tickets.cli._computing import Computing
from lottery_tickets.cli._criteria import Criterion, compute_scores
from lottery_tickets.cli._meter import Cost, metered
from lottery_tickets.cli._spreads import Spread, draw, rehearse
from lottery_tickets.errors import EvaluationError
from lottery_tickets.masks import applied

if TYPE_CHECKING:
    from torch import nn

    from lottery_tickets.masks import Mask

Batches = Sequence[Mapping[str, torch.Tensor]]


class Row(TypedDict):
    """One ticket of a comparison.

    Attributes:
        criterion: What weights were ranked by.
        spread: Where the removed ones lie: "global", "layer", "row", an allocation or a pattern.
        target_sparsity: As asked; None for a pattern.
        quality: See `TicketQuality`.
        emptied: Tensors that lost every weight.
        seconds_scoring: For the scores, which serve every row of the criterion; 0 where weights rank themselves.
        seconds_drawing: From scores to the mask.
        peak_bytes: Host memory at its highest above the model, while scoring or drawing; None where not known.
        peak_device_bytes: The same on the accelerator; None on a CPU.
    """

    criterion: str
    spread: str
    target_sparsity: float | None
    quality: TicketQuality
    emptied: int
    seconds_scoring: float
    seconds_drawing: float
    peak_bytes: int | None
    peak_device_bytes: int | None


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        model: In evaluation mode, on its device.
        test: Batches that tickets are judged on.
        calibration: Batches that scores are computed from; disjoint from `test`.
        ways: Criteria, each with where the removed weights lie; those of one criterion stand together.
        sparsities: Each with every way that is not a pattern.
        confidence: Coverage of the intervals.
        computing: How scores are computed.
        progress: Show bars.
        note: Takes a line on what was done.
    """

    model: nn.Module
    test: Batches
    calibration: Batches
    ways: Sequence[tuple[Criterion, Spread]]
    sparsities: Sequence[float]
    confidence: float = 0.95
    computing: Computing = field(default_factory=Computing)
    progress: bool = False
    note: Callable[[str], None] = lambda _: None

    def rows(self) -> Iterator[Row]:
        """A row for each ticket as it is measured, the criteria one after another.

        The dense model goes through the test batches once. At any time one criterion's scores and one ticket are
        held.

        Raises:
            EvaluationError: A loss that is not finite.
        """
        dense = self._losses(None, "the dense model")
        for criterion, ways in groupby(self._distinct(), key=lambda way: way[0]):
            scores, scoring = self._scores(criterion)
            for _, spread in ways:
                for sparsity in [None] if spread.pattern else self.sparsities:
                    yield self._row(criterion, scores, scoring, spread, sparsity, dense)
            del scores

    def rehearse(self) -> None:
        """Meet what cannot be drawn before anything is computed.

        Raises:
            LotteryTicketError: A sparsity, spread or pattern that this model cannot have.
        """
        drawn = set()
        for criterion, spread in self._distinct():
            spread.check(criterion)
            if spread.label(criterion) not in drawn:
                drawn.add(spread.label(criterion))
                rehearse(self.model, criterion, [] if spread.pattern else self.sparsities, spread)

    def _distinct(self) -> list[tuple[Criterion, Spread]]:
        """Without ways that come to the same."""
        return list({(one.name, spread.label(one)): (one, spread) for one, spread in self.ways}.values())

    def _scores(self, criterion: Criterion) -> tuple[dict[str, torch.Tensor] | None, Cost]:
        if criterion.scorer is None:
            return None, Cost(0.0, 0, 0 if self._device.type == "cuda" else None)
        scores, cost = metered(
            lambda: compute_scores(
                criterion, self.model, self.calibration, self.computing, progress=self.progress
            ),
            self._device,
        )
        self.note(f"{criterion.name}: scored in {cost.seconds:.1f} s")
        return scores, cost

    def _row(
        self,
        criterion: Criterion,
        scores: dict[str, torch.Tensor] | None,
        scoring: Cost,
        spread: Spread,
        sparsity: float | None,
        dense: Sequence[BatchLoss],
    ) -> Row:
        wanted = [] if sparsity is None else [sparsity]
        (mask,), drawing = metered(
            lambda: draw(self.model, scores, criterion, wanted, spread, progress=self.progress), self._device
        )
        whose = f"{criterion.name}, {spread.label(criterion)}, sparsity {mask.sparsity:.3f}"
        quality = ticket_quality(
            self._losses(mask, whose), baseline=dense, sparsity=mask.sparsity, confidence=self.confidence
        )
        held = sum(tensor.nbytes for tensor in scores.values()) if scores else 0
        return Row(
            criterion=criterion.name,
            spread=spread.label(criterion),
            target_sparsity=sparsity,
            quality=quality,
            emptied=sum(not kept for kept in mask.layer_kept().values()),
            seconds_scoring=scoring.seconds,
            seconds_drawing=drawing.seconds,
            peak_bytes=_higher(scoring.host_bytes, drawing.host_bytes, held),
            peak_device_bytes=_higher(scoring.device_bytes, drawing.device_bytes, 0),
        )

    def _losses(self, mask: Mask | None, whose: str) -> list[BatchLoss]:
        losses = []
        with (
            evaluating(self.model),
            nullcontext() if mask is None else applied(self.model, mask),
            tqdm(self.test, desc=whose, delay=2, leave=False, disable=not self.progress) as batches,
        ):
            for batch in batches:
                part = measure(self.model, batch)
                if not math.isfinite(part.loss_sum):
                    raise EvaluationError(f"The loss of {whose} is {part.mean} on a window of the test text.")
                losses.append(part)
        return losses

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device


def _higher(scoring: int | None, drawing: int | None, held: int) -> int | None:
    """Peak above the model of two stages, the second beginning with the scores held."""
    if scoring is None or drawing is None:
        return None
    return max(scoring, held + drawing)
