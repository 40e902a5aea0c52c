"""From losses batch by batch to the quality of a ticket."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from lottery_tickets._batches import BatchLoss, total
from lottery_tickets._statistics import Interval, ratio_interval
from lottery_tickets.errors import EvaluationError

RetentionMetric = Literal["accuracy", "loss"]


class Baseline(TypedDict):
    """What a ticket is compared with.

    Attributes:
        loss: Mean loss of the dense model; None if only an accuracy was given.
        perplexity: Its exponential, for token models.
        accuracy: Share of the labels the dense model gets right, where labels are classes.
        loss_interval: Confidence interval of the loss; None if given beforehand or from one batch.
        perplexity_interval: Its exponential, for token models.
    """

    loss: float | None
    perplexity: float | None
    accuracy: float | None
    loss_interval: Interval | None
    perplexity_interval: Interval | None


class TicketQuality(TypedDict):
    """What `compute_lottery_ticket_quality` returns.

    Attributes:
        loss: Mean loss of the ticket, every token or sample weighing the same.
        perplexity: exp(loss) where the loss is one of tokens (nats per token), else None.
        accuracy: Share of the labels the ticket gets right, where labels are classes, else None.
        loss_interval: Confidence interval of the loss over batches; None with one batch.
        perplexity_interval: Its exponential, for token models.
        sparsity: Fraction of the mask's weights removed.
        num_batches_evaluated: Batches that count.
        num_batches_skipped: Batches left out because a loss was not finite (`nonfinite="skip"`).
        num_samples: Rows of the batches that count.
        num_units: What the means are over: tokens, labels, elements of a regression target, or samples.
        baseline: The dense model on the same batches, or what was given.
        quality_score: `sparsity * min(1, r)`: the fraction removed, discounted by what its removal cost; 0 for a
            dense model, close to 1 for a very sparse ticket that lost nothing. r is the retention, but for token
            models dense perplexity over the ticket's: the loss of a model that is down to guessing is only a few
            times the dense one. None where the retention is None.
        performance_retention: 1.0 is as good as dense, more is better. Accuracy of the ticket over dense accuracy
            where there is one, else dense loss over the ticket's. None where the ratio has no meaning: a loss that
            is not positive, or a dense accuracy of 0.
        retention_metric: "accuracy" or "loss": which of the two.
        retention_interval: Confidence interval of the retention; None with one batch.
        confidence: Coverage of the intervals.
    """

    loss: float
    perplexity: float | None
    accuracy: float | None
    loss_interval: Interval | None
    perplexity_interval: Interval | None
    sparsity: float
    num_batches_evaluated: int
    num_batches_skipped: int
    num_samples: int
    num_units: int
    baseline: Baseline
    quality_score: float | None
    performance_retention: float | None
    retention_metric: RetentionMetric
    retention_interval: Interval | None
    confidence: float


def ticket_quality(
    ticket: Sequence[BatchLoss],
    *,
    baseline: Sequence[BatchLoss] | Mapping[str, float],
    sparsity: float,
    confidence: float,
) -> TicketQuality:
    """Quality from the ticket's losses and the dense model's, or what is known of it beforehand.

    Batches where a loss is not finite are left out on both sides.

    Raises:
        EvaluationError: Nothing is left, or a known baseline that does not fit.
    """
    measured = None if isinstance(baseline, Mapping) else baseline
    evaluated = len(ticket)
    sides = [ticket] if measured is None else [ticket, measured]
    rows = [row for row in zip(*sides, strict=True) if all(math.isfinite(part.loss_sum) for part in row)]
    ticket = [row[0] for row in rows]
    whole = total(ticket)
    if not whole.units:
        raise EvaluationError(
            "There is nothing to measure: "
            + ("every label is ignored (-100, or padding)." if ticket else "no batch has a finite loss.")
        )
    dense = None if measured is None else [row[1] for row in rows]
    compared = _measured(dense, confidence) if dense is not None else _known(baseline, whole)
    has_accuracies = whole.accuracy is not None and compared["accuracy"] is not None
    metric: RetentionMetric = "accuracy" if has_accuracies else "loss"
    retention, retention_interval = _retention(metric, ticket, dense, compared, confidence)
    own = _measured(ticket, confidence)
    return TicketQuality(
        loss=whole.mean,
        perplexity=own["perplexity"],
        accuracy=own["accuracy"],
        loss_interval=own["loss_interval"],
        perplexity_interval=own["perplexity_interval"],
        sparsity=sparsity,
        num_batches_evaluated=len(ticket),
        num_batches_skipped=evaluated - len(ticket),
        num_samples=whole.samples,
        num_units=whole.units,
        baseline=compared,
        quality_score=None if retention is None else sparsity * min(1.0, _remains(retention, whole, compared)),
        performance_retention=retention,
        retention_metric=metric,
        retention_interval=retention_interval,
        confidence=confidence,
    )


def checked_baseline(given: float | Mapping[str, Any] | None) -> Mapping[str, float] | None:
    """What a caller says of the dense model; a bare number stands under the empty name until labels are seen."""
    if given is None:
        return None
    if not isinstance(given, Mapping):
        return {"": _number("baseline_performance", given)}
    known = {name: given[name] for name in ("loss", "accuracy") if given.get(name) is not None}
    if not known:
        raise EvaluationError(
            f"baseline_performance has neither 'loss' nor 'accuracy'; its keys are {sorted(map(str, given))}."
        )
    return {name: _number(f"baseline_performance[{name!r}]", value) for name, value in known.items()}


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not hasattr(value, "__float__") or not math.isfinite(value):
        raise EvaluationError(
            f"{name} is a finite number, or a mapping with 'loss' or 'accuracy' such as quality['baseline']; "
            f"got {value!r}."
        )
    return float(value)


def _known(given: Any, ticket: BatchLoss) -> Baseline:
    """The baseline that was given, read by what the ticket's batches have."""
    bare = "loss" if ticket.accuracy is None else "accuracy"
    values = {name or bare: value for name, value in given.items()}
    accuracy, loss = values.get("accuracy"), values.get("loss")
    if loss is None and ticket.accuracy is None:
        raise EvaluationError("baseline_performance has only an accuracy, but these batches have only a loss.")
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise EvaluationError(
            f"baseline_performance: where labels are classes it is the dense accuracy, in [0, 1]; got {accuracy}. "
            "A dense loss is given as {'loss': ...}."
        )
    perplexity = _exp(loss) if ticket.tokens and loss is not None else None
    return Baseline(
        loss=loss, perplexity=perplexity, accuracy=accuracy, loss_interval=None, perplexity_interval=None
    )


def _measured(parts: Sequence[BatchLoss], confidence: float) -> Baseline:
    whole = total(parts)
    units = [float(part.units) for part in parts if part.units]
    interval = ratio_interval(_sums(parts, "loss"), units, confidence)
    return Baseline(
        loss=whole.mean,
        perplexity=_exp(whole.mean) if whole.tokens else None,
        accuracy=whole.accuracy,
        loss_interval=interval,
        perplexity_interval=(_exp(interval[0]), _exp(interval[1])) if whole.tokens and interval else None,
    )


def _retention(
    metric: RetentionMetric,
    ticket: Sequence[BatchLoss],
    dense: Sequence[BatchLoss] | None,
    baseline: Baseline,
    confidence: float,
) -> tuple[float | None, Interval | None]:
    """The ratio, and its interval: paired, or against a baseline taken as exact."""
    reference, whole = baseline[metric], total(ticket)
    own = whole.accuracy if metric == "accuracy" else whole.mean
    if own is None or reference is None or reference <= 0 or (metric == "loss" and own <= 0):
        return None, None
    known = [reference * part.units for part in ticket if part.units]
    tickets, denses = _sums(ticket, metric), known if dense is None else _sums(dense, metric)
    if metric == "accuracy":
        return own / reference, ratio_interval(tickets, denses, confidence)
    return reference / own, ratio_interval(denses, tickets, confidence)


def _remains(retention: float, ticket: BatchLoss, baseline: Baseline) -> float:
    if ticket.tokens and baseline["loss"] is not None:
        return _exp(baseline["loss"] - ticket.mean)
    return retention


def _sums(parts: Sequence[BatchLoss], metric: RetentionMetric) -> list[float]:
    return [(part.correct or 0) if metric == "accuracy" else part.loss_sum for part in parts if part.units]


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
