"""What comes of an instability analysis."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Literal, TypedDict

from lottery_tickets._statistics import Interval, ratio_interval
from lottery_tickets.errors import EvaluationError

Metric = Literal["error", "loss"]


class SiblingPair(TypedDict):
    """Two networks trained to the end from one, in different orders of the data, and the path between them.

    Attributes:
        seed: Of the network that both come from: of its weights and of its order of the data.
        rewind_step: Where they left it.
        sibling_seeds: Of their own orders.
        alphas: Points on the path, from the first sibling (0.0) to the second (1.0).
        losses: Mean loss at each.
        errors: 1 - accuracy at each; None where the data has no classes.
        loss_barrier: Largest loss minus the mean of those of the siblings.
        error_barrier: The same of the errors.
    """

    seed: int
    rewind_step: int
    sibling_seeds: list[int]
    alphas: list[float]
    losses: list[float]
    errors: list[float] | None
    loss_barrier: float
    error_barrier: float | None


class InstabilityPoint(TypedDict):
    """All pairs of one rewinding step.

    Attributes:
        rewind_step: The step.
        loss_barrier: Mean over seeds.
        loss_interval: Confidence interval of that mean (Student's t); None for a single seed.
        error_barrier: Mean over seeds; None where the data has no classes.
        error_interval: Of that mean.
        loss: Mean over the siblings themselves, the ends of the paths.
        error: Likewise.
    """

    rewind_step: int
    loss_barrier: float
    loss_interval: Interval | None
    error_barrier: float | None
    error_interval: Interval | None
    loss: float
    error: float | None


class Instability(TypedDict):
    """What `compute_instability` returns.

    Attributes:
        curve: A point for each rewinding step, ascending.
        rewind_step: The smallest step at which the mean barrier is below the threshold, as it is at all larger
            ones; None if it is not at the largest.
        barrier: The mean barrier there.
        interval: Its confidence interval; None for a single seed.
        certain_step: The smallest step at which the interval's upper end is below the threshold, as at all larger
            ones; None if there is none, or a single seed.
        metric: Whose barrier counts: "error" or "loss".
        threshold: What it is compared with.
        confidence: Of the intervals.
        pairs: Every pair.
    """

    curve: list[InstabilityPoint]
    rewind_step: int | None
    barrier: float | None
    interval: Interval | None
    certain_step: int | None
    metric: Metric
    threshold: float
    confidence: float
    pairs: list[SiblingPair]


def having(metric: Metric, pair: SiblingPair) -> SiblingPair:
    """The pair, if it has a barrier of that metric.

    Raises:
        EvaluationError: It has none.
    """
    if metric == "error" and pair["error_barrier"] is None:
        raise EvaluationError(
            "The data has no classes to be right about (or loss_fn is given), so there are no errors. Pass "
            "metric='loss' and a threshold in its units."
        )
    return pair


def summarised(
    pairs: Sequence[SiblingPair], *, metric: Metric, threshold: float, confidence: float
) -> Instability:
    """The pairs as a curve, and where it comes to lie below the threshold."""
    steps = sorted({pair["rewind_step"] for pair in pairs})
    curve = [_point([pair for pair in pairs if pair["rewind_step"] == step], confidence) for step in steps]
    heights = [point["error_barrier"] if metric == "error" else point["loss_barrier"] for point in curve]
    intervals = [point["error_interval"] if metric == "error" else point["loss_interval"] for point in curve]
    mean_below = [height is not None and height < threshold for height in heights]
    surely_below = [interval is not None and interval[1] < threshold for interval in intervals]
    first, certain = _from_where_on(mean_below), _from_where_on(surely_below)
    return Instability(
        curve=curve,
        rewind_step=None if first is None else steps[first],
        barrier=None if first is None else heights[first],
        interval=None if first is None else intervals[first],
        certain_step=None if certain is None else steps[certain],
        metric=metric,
        threshold=threshold,
        confidence=confidence,
        pairs=list(pairs),
    )


def _point(pairs: Sequence[SiblingPair], confidence: float) -> InstabilityPoint:
    loss_barriers = [pair["loss_barrier"] for pair in pairs]
    error_barriers = [pair["error_barrier"] for pair in pairs if pair["error_barrier"] is not None]
    errors = [
        end for pair in pairs if pair["errors"] is not None for end in (pair["errors"][0], pair["errors"][-1])
    ]
    return InstabilityPoint(
        rewind_step=pairs[0]["rewind_step"],
        loss_barrier=fmean(loss_barriers),
        loss_interval=_interval(loss_barriers, confidence),
        error_barrier=fmean(error_barriers) if error_barriers else None,
        error_interval=_interval(error_barriers, confidence),
        loss=fmean([end for pair in pairs for end in (pair["losses"][0], pair["losses"][-1])]),
        error=fmean(errors) if errors else None,
    )


def _interval(values: Sequence[float], confidence: float) -> Interval | None:
    """Of the mean, which is a ratio to sums of ones."""
    return ratio_interval(values, [1.0] * len(values), confidence)


def _from_where_on(holds: Sequence[bool]) -> int | None:
    """The first place from which on all hold."""
    first = len(holds)
    while first and holds[first - 1]:
        first -= 1
    return first if first < len(holds) else None
