"""One pass over the samples, whose gradients go by parameter by parameter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lottery_tickets._batches import BatchLoss, LossFunction, SampleLosses, measure, size_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import BatchError, ScoreError
from lottery_tickets.gradients._backward import Backward
from lottery_tickets.gradients._model import differentiated
from lottery_tickets.gradients._plan import Plan, look_at
from lottery_tickets.gradients._taps import MisfitError, Receiver, Taps
from lottery_tickets.gradients._together import NotBySampleError, Together

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
        together: The ranks that go through samples of their own at the same time, and what their passes have to do
            with each other.
    """

    model: nn.Module
    places: Mapping[str, Sequence[tuple[nn.Module, str]]]
    grouping: Grouping = "sample"
    loss_fn: LossFunction | None = None
    clip: float | None = None
    drawn: torch.Generator | None = None
    autocast: bool = False
    together: Together = field(default_factory=Together)
    _plan: Plan | None = field(default=None, init=False)

    @property
    def ranks(self) -> Ranks:
        """Those that go through samples of their own at the same time."""
        return self.together.ranks

    def go_through(self, batches: Iterable[Any], names: Sequence[str], receiver: Receiver) -> Counter[str]:
        """Hand on every gradient of these parameters.

        Returns:
            Counts: "samples" that had a loss, "steps", the gradients that each parameter was handed on with; those
            of all ranks.

        Raises:
            ScoreError: A loss that is not finite, no sample with a loss on any rank.
            BatchError: See `measure`.
        """
        counts: Counter[str] = Counter()
        for number, (batch, is_own) in enumerate(self.together.batches(batches)):
            if self._plan is None:
                self._plan = self._planned(batch)
            counts += self._through_batch(_Piece(batch, number, is_own), names, receiver)
        counts = sum(self.ranks.gather(counts), Counter())
        if not counts["samples"]:
            raise ScoreError("No sample has a label that counts, so there are no gradients.")
        return counts

    def _planned(self, batch: Any) -> Plan | None:
        """From the first sample with a label; None if there is none."""
        for one, _ in self.together.rows(batch):
            with self.together.passing():
                try:
                    seen = look_at(self.places, partial(self._loss_of_one, one))
                except _NoLabelError:
                    seen = None
            seen = self.together.agreed(seen, len(self.places))
            if seen is not None:
                return Plan.of(self.places, seen.tapped, singly=seen.singly and self.grouping == "sample")
        return None

    def _loss_of_one(self, sample: Any) -> torch.Tensor:
        rows = self._measure(sample).rows
        if rows is None or not bool(rows.counted.any()):
            raise _NoLabelError
        return rows.losses

    def _through_batch(self, piece: _Piece, names: Sequence[str], receiver: Receiver) -> Counter[str]:
        if self._plan is None:  # every sample so far is without labels
            return Counter()
        if not self._plan.singly:
            try:
                return self._through_piece(piece, names, receiver)
            except NotBySampleError:
                if self.grouping == "batch mean":
                    raise BatchError(
                        "The model or loss_fn gives one loss for all samples of a batch; let loss_fn return one "
                        "for each sample, or give batches of one."
                    ) from None
            except MisfitError:
                pass
            self._plan = self._plan.one_by_one()
        counts: Counter[str] = Counter()
        for row, is_own in self.together.rows(piece.batch):
            one = _Piece(row, piece.number, is_own and piece.is_own)
            counts += self._through_piece(one, names, receiver)
        return counts

    def _through_piece(self, piece: _Piece, names: Sequence[str], receiver: Receiver) -> Counter[str]:
        assert self._plan is not None
        # A norm is over all parameters, also where only some are asked for.
        plan = self._plan if self.clip is not None else self._plan.only(names)
        taps, whole = Taps(plan.tapped), self.grouping != "sample"
        with (
            differentiated(one for ones in plan.others.values() for one in ones),
            taps.attached(),
            self.together.watching(plan.others),
        ):
            rows = self._forward(piece, taps)
            counted = [row for row, has_units in enumerate(rows.counted.tolist()) if has_units and piece.is_own]
            if not counted and not self.together.always:
                return Counter()
            wanted = [0] if whole and counted else counted
            weights = rows.counted.to(rows.losses) if counted else torch.zeros_like(rows.losses)
            # By themselves: what could draw other labels holds the logits.
            losses = rows.losses
            del rows
            with self.together.passing(forward=False):
                losses, weights = self.together.reaching(losses, weights)
                backward = Backward(losses, taps, self.together.present(plan.others), wanted)
                if self.grouping == "batch mean":
                    weights = weights / max(1, len(counted))
                if self.clip is not None:
                    weights = weights * _clipping(backward, weights, self.clip)
                backward.run(weights, _Chosen(receiver, frozenset(names)))
        return Counter(samples=len(counted), steps=len(wanted))

    def _forward(self, piece: _Piece, taps: Taps) -> SampleLosses:
        """The losses, all ranks having come through."""
        found: SampleLosses | NotBySampleError | MisfitError
        with self.together.passing():
            try:
                with taps.forward(size_of(piece.batch) if self.grouping == "sample" else None):
                    found = self._rows(piece.batch)
            except (NotBySampleError, MisfitError) as error:
                found = error
        if isinstance(found, SampleLosses) and piece.is_own:
            _check_finite(found, piece.number)
        return self.together.agreed_losses(found)

    def _measure(self, batch: Any) -> BatchLoss:
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, torch.bfloat16) if self.autocast else nullcontext():
            return measure(self.model, batch, loss_fn=self.loss_fn)

    def _rows(self, batch: Any) -> SampleLosses:
        part = self._measure(batch)
        if part.rows is None:
            if part.samples > 1:
                raise NotBySampleError
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
    squares = _Squares(torch.zeros(len(weights), dtype=torch.float64))
    backward.run(weights, squares, keep=True)
    norms = squares.sums.sqrt()
    return torch.where(norms > longest, longest / norms, 1.0).to(weights)


class _Piece(NamedTuple):
    """Samples that go through the model at once: those of a batch by its number, or one that does not count."""

    batch: Any
    number: int
    is_own: bool


class _Squares(NamedTuple):
    """Takes gradients of samples for the squares of their norms."""

    sums: torch.Tensor

    def receive(self, _name: str, row: int, gradient: torch.Tensor) -> None:
        self.sums[row] += float(torch.linalg.vector_norm(gradient, dtype=torch.float64)) ** 2

    def finished(self, _name: str) -> None:
        """Nothing is left to do."""


class _Chosen(NamedTuple):
    """Hands on the gradients of some of the parameters."""

    to: Receiver
    names: frozenset[str]

    def receive(self, name: str, row: int, gradient: torch.Tensor) -> None:
        if name in self.names:
            self.to.receive(name, row, gradient)

    def finished(self, name: str) -> None:
        if name in self.names:
            self.to.finished(name)


class _NoLabelError(Exception):
    """A sample without a label that counts."""
