"""One pass over the samples, whose gradients go by parameter by parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from lottery_tickets._batches import BatchLoss, LossFunction, SampleLosses, measure, samples_of, size_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import BatchError, ScoreError
from lottery_tickets.gradients._backward import Backward
from lottery_tickets.gradients._model import differentiated
from lottery_tickets.gradients._plan import Plan, plan_for
from lottery_tickets.gradients._taps import MisfitError, Receive, Taps

Grouping = Literal["sample", "batch mean", "batch sum"]


@dataclass
class Gradients:
    """Gradients of a model's losses with respect to some of its parameters, sample by sample or batch by batch.

    Attributes:
        model: In the hands of `borrowed`.
        places: Canonical name to the modules and attributes that hold the parameter.
        grouping: "sample" hands on the gradient of each sample's loss, the others that of their mean or sum over
            each batch.
        loss_fn: See `measure`.
        clip: Largest norm of a sample's gradient over all these parameters; longer ones are scaled down to it.
            For samples only.
        drawn: Draws the labels that samples are held against; None for their own.
        autocast: Compute in bfloat16 on an accelerator.
        ranks: Those that go through samples of their own at the same time.
    """

    model: nn.Module
    places: Mapping[str, Sequence[tuple[nn.Module, str]]]
    grouping: Grouping = "sample"
    loss_fn: LossFunction | None = None
    clip: float | None = None
    drawn: torch.Generator | None = None
    autocast: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    _plan: Plan | None = field(default=None, init=False)

    def go_through(self, batches: Iterable[Any], names: Sequence[str], receive: Receive) -> Counter[str]:
        """Hand on every gradient of these parameters.

        Returns:
            Counts: "samples" that had a loss, "steps", the gradients that each parameter was handed on with; those
            of all ranks.

        Raises:
            ScoreError: A loss that is not finite, no sample with a loss on any rank.
            BatchError: See `measure`.
        """
        counts: Counter[str] = Counter()
        for number, batch in enumerate(batches):
            if self._plan is None:
                self._plan = self._planned(batch)
            counts += self._through_batch(batch, number, names, receive)
        counts = sum(self.ranks.gather(counts), Counter())
        if not counts["samples"]:
            raise ScoreError("No sample has a label that counts, so there are no gradients.")
        return counts

    def _planned(self, batch: Any) -> Plan | None:
        """From the first sample with a label; None if there is none."""
        for row in range(size_of(batch)):
            one = samples_of(batch, row, row + 1)
            try:
                return plan_for(self.places, partial(self._loss_of_one, one), by_sample=self.grouping == "sample")
            except _NoLabelError:
                continue
        return None

    def _loss_of_one(self, sample: Any) -> torch.Tensor:
        rows = self._measure(sample).rows
        if rows is None or not bool(rows.counted.any()):
            raise _NoLabelError
        return rows.losses

    def _through_batch(self, batch: Any, number: int, names: Sequence[str], receive: Receive) -> Counter[str]:
        if self._plan is None:  # every sample so far is without labels
            return Counter()
        if not self._plan.singly:
            try:
                return self._through_piece(batch, number, names, receive)
            except _NotBySampleError:
                if self.grouping == "batch mean":
                    raise BatchError(
                        "The model or loss_fn gives one loss for all samples of a batch; let loss_fn return one "
                        "for each sample, or give batches of one."
                    ) from None
            except MisfitError:
                pass
            self._plan = self._plan.one_by_one()
        counts: Counter[str] = Counter()
        for row in range(size_of(batch)):
            counts += self._through_piece(samples_of(batch, row, row + 1), number, names, receive)
        return counts

    def _through_piece(self, piece: Any, number: int, names: Sequence[str], receive: Receive) -> Counter[str]:
        assert self._plan is not None
        # A norm is over all parameters, also where only some are asked for.
        plan = self._plan if self.clip is not None else self._plan.only(names)
        taps = Taps(plan.tapped)
        with differentiated(one for ones in plan.others.values() for one in ones), taps.attached():
            with taps.forward(size_of(piece) if self.grouping == "sample" else None):
                rows = self._rows(piece)
            _check_finite(rows, number)
            weights = rows.counted.to(rows.losses)
            counted = [row for row, has_units in enumerate(rows.counted.tolist()) if has_units]
            if not counted:
                return Counter()
            whole = self.grouping != "sample"
            # By themselves: what could draw other labels holds the logits.
            losses = rows.losses
            del rows
            backward = Backward(losses, taps, plan.others, [0] if whole else counted)
            if self.grouping == "batch mean":
                weights = weights / len(counted)
            if self.clip is not None:
                weights = weights * _clipping(backward, weights, self.clip)
            chosen = set(names)
            backward.run(weights, lambda name, row, one: receive(name, row, one) if name in chosen else None)
        return Counter(samples=len(counted), steps=1 if whole else len(counted))

    def _measure(self, batch: Any) -> BatchLoss:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext():
            return measure(self.model, batch, loss_fn=self.loss_fn)

    def _rows(self, batch: Any) -> SampleLosses:
        part = self._measure(batch)
        if part.rows is None:
            if part.samples > 1:
                raise _NotBySampleError
            return SampleLosses(torch.zeros(1), torch.zeros(1, dtype=torch.bool))  # no label that counts
        if self.drawn is None:
            return part.rows
        if part.rows.drawn is None:
            raise ScoreError(
                "kind='true' draws labels from what the model's output says of them, which is not known where the "
                "model or loss_fn computes the loss. Use kind='empirical'."
            )
        return replace(part.rows, losses=part.rows.drawn(self.drawn))


def _check_finite(rows: SampleLosses, number: int) -> None:
    finite = rows.losses.detach().isfinite()
    if not bool(finite.all()):
        row = int((~finite).nonzero()[0])
        raise ScoreError(
            f"Batch {number}, sample {row}: the loss is {rows.losses[row].item()}, which has no gradient. "
            "Leave the sample out, or compute in a wider data type."
        )


def _clipping(backward: Backward, weights: torch.Tensor, longest: float) -> torch.Tensor:
    """Factor for each sample that brings its gradient down to the largest norm allowed."""
    squares = torch.zeros(len(weights), dtype=torch.float64)

    def receive(_name: str, row: int, gradient: torch.Tensor) -> None:
        squares[row] += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2

    backward.run(weights, receive, keep=True)
    norms = squares.sqrt()
    return torch.where(norms > longest, longest / norms, 1.0).to(weights)


class _NoLabelError(Exception):
    """A sample without a label that counts."""


class _NotBySampleError(Exception):
    """One loss came for several samples."""
