"""How a network bears pruning: its loss over a range of sparsities."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, TypedDict

import torch
from torch import nn
from tqdm import tqdm

from lottery_tickets._batches import LossFunction, batches_of, measure_mean
from lottery_tickets.errors import EvaluationError, SparsityError
from lottery_tickets.masks import Mask, applied, prunable_parameters
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.sparsity import Selection, Selector, Sorting, check_sparsity, removed_count

# A level that retains less than this is where a network is said to break.
_CRITICAL_RETENTION = 0.9


class SparsityLevel(TypedDict):
    """One point of a sparsity curve.

    Attributes:
        sparsity: What was asked for.
        actual_sparsity: Fraction of the prunable weights removed, `round(sparsity * N) / N`.
        loss: Mean loss of the ticket.
        loss_increase: Its difference from the dense loss.
        performance_retention: Dense loss over ticket loss.
    """

    sparsity: float
    actual_sparsity: float
    loss: float
    loss_increase: float
    performance_retention: float


class RobustnessMetrics(TypedDict):
    """A sparsity curve in four numbers; s_i are its levels, r_i their retentions.

    Attributes:
        winning_ticket_score: `sum(s_i r_i) / sum(s_i)`: mean retention in which sparser levels weigh more.
        critical_sparsity: The lowest level with a retention below 0.9, None if there is none.
        optimal_sparsity: The level with the largest `s_i r_i`; the lower one of two that are equal.
        area_under_curve: Area under retention over sparsity by the trapezoid rule, from the dense network
            (0, 1) to the highest level, divided by that level: 1.0 is a network that loses nothing.
    """

    winning_ticket_score: float
    critical_sparsity: float | None
    optimal_sparsity: float
    area_under_curve: float


class _Measured(TypedDict):
    baseline_loss: float
    sparsity_curves: dict[str, SparsityLevel]
    robustness_metrics: RobustnessMetrics


class PruningRobustness(_Measured, total=False):
    """What `compute_pruning_robustness` returns.

    Attributes:
        baseline_loss: Mean loss of the dense model.
        sparsity_curves: "sparsity_<percent>", as in "sparsity_90", to its `SparsityLevel`.
        robustness_metrics: The curve in four numbers.
        masks: The tickets under the same keys; there if `return_masks` was set.
    """

    masks: dict[str, Mask]


def compute_pruning_robustness(
    model: nn.Module,
    batch: Any,
    sparsity_levels: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    use_histogram_quantiles: bool = True,
    return_masks: bool = False,
    *,
    loss_fn: LossFunction | None = None,
    progress: bool = True,
    check_memory: bool = True,
) -> PruningRobustness:
    """Loss of a model's global magnitude tickets at several sparsities, without training.

    The lines of all levels come from one counting of the weights; one ticket's bits are in memory at a time,
    unless all are asked for. Losses are means over tokens or samples, from float32 logits.

    Args:
        model: Any module; comes back as it was.
        batch: One batch, or a dataloader: its batches are held, so that every level sees the same ones.
        sparsity_levels: Fractions removed, in [0, 1).
        use_histogram_quantiles: False sorts all magnitudes instead: the same tickets, more time and memory.
        return_masks: Return the tickets too.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss; its losses are not negative.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        A `PruningRobustness`.

    Raises:
        SparsityError: No levels, or one outside [0, 1).
        WeightsError: NaN, meta tensors, or a data type without magnitudes.
        BatchError: A batch of an unknown form.
        MemoryPlanError: More memory is needed than is free.
        EvaluationError: Nothing to measure, or a loss that is negative or not finite; the message says at which
            sparsity.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_pruning_robustness
        >>> model = torch.nn.Linear(4, 2, bias=False)
        >>> model.weight.data = torch.tensor([[1.0, 0.1, 0.0, 0.0], [0.0, 0.0, 0.1, 1.0]])
        >>> batch = (torch.eye(4), torch.tensor([0, 0, 1, 1]))
        >>> curve = compute_pruning_robustness(model, batch, (0.5, 0.75))
        >>> [round(level["performance_retention"], 3) for level in curve["sparsity_curves"].values()]
        [1.0, 0.952]
        >>> curve["robustness_metrics"]["critical_sparsity"] is None
        True

    References:
        Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, section
        4.1 and figure 5: loss of accuracy over the fraction of parameters removed, without retraining.
    """
    levels = {f"sparsity_{100 * check_sparsity(level):g}": float(level) for level in sparsity_levels}
    if not levels:
        raise SparsityError("sparsity_levels is empty: give at least one fraction in [0, 1).")
    batches = list(batches_of(batch))
    refuse_if_too_large(
        "robustness",
        model,
        batches,
        check=check_memory,
        masks=len(levels) if return_masks else 1,
        use_histogram=use_histogram_quantiles,
    )
    weights = prunable_parameters(model)
    numel = sum(weight.numel() for weight in weights.values())
    shapes = {name: weight.shape for name, weight in weights.items()}
    selector = _selector(weights, use_histogram=use_histogram_quantiles, progress=progress)
    lines = selector.lines([removed_count(level, numel) for level in levels.values()])
    baseline = _loss(model, batches, loss_fn, "the dense model")
    curve: dict[str, SparsityLevel] = {}
    masks: dict[str, Mask] = {}
    bar = tqdm(levels.items(), desc="measuring sparsities", delay=2, disable=not progress)
    for (key, level), line in zip(bar, lines, strict=True):
        mask = Mask.from_packed(selector.bits(line), shapes)
        with applied(model, mask):
            loss = _loss(model, batches, loss_fn, f"sparsity {level}")
        curve[key] = SparsityLevel(
            sparsity=level,
            actual_sparsity=mask.sparsity,
            loss=loss,
            loss_increase=loss - baseline,
            performance_retention=_retention(baseline, loss),
        )
        if return_masks:
            masks[key] = mask
    found = PruningRobustness(
        baseline_loss=baseline, sparsity_curves=curve, robustness_metrics=_metrics(list(curve.values()))
    )
    if return_masks:
        found["masks"] = masks
    return found


def _selector(weights: Mapping[str, torch.Tensor], *, use_histogram: bool, progress: bool) -> Selector:
    if not use_histogram:
        return Sorting(weights)
    return Selection(weights, progress="counting weights" if progress else None)


def _loss(model: nn.Module, batches: Sequence[Any], loss_fn: LossFunction | None, which: str) -> float:
    loss = measure_mean(model, batches, loss_fn=loss_fn).mean
    if not math.isfinite(loss) or loss < 0:
        raise EvaluationError(
            f"The loss of {which} is {loss}; retention compares losses that are finite and not negative. "
            "Leave that sparsity out, or give another loss_fn."
        )
    return loss


def _retention(baseline: float, loss: float) -> float:
    if loss == 0:
        return 1.0 if baseline == 0 else math.inf
    return baseline / loss


def _metrics(curve: Sequence[SparsityLevel]) -> RobustnessMetrics:
    ordered = sorted(curve, key=lambda level: level["sparsity"])
    points = [(level["sparsity"], level["performance_retention"]) for level in ordered]
    highest = points[-1][0]
    weight = sum(sparsity for sparsity, _ in points)
    area = sum((right - left) * (low + high) / 2 for (left, low), (right, high) in pairwise([(0.0, 1.0), *points]))
    return RobustnessMetrics(
        winning_ticket_score=sum(s * r for s, r in points) / weight if weight else 1.0,
        critical_sparsity=next((s for s, r in points if r < _CRITICAL_RETENTION), None),
        optimal_sparsity=max(points, key=lambda point: point[0] * point[1])[0],
        area_under_curve=area / highest if highest else 1.0,
    )
