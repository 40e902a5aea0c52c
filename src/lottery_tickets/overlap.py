"""How far two tickets keep the same weights, and how far chance alone would make them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import torch

from lottery_tickets.errors import EvaluationError, MaskMismatchError
from lottery_tickets.masks import Mask, ShardedMask, as_mask, count_common

OverlapMethod = Literal["jaccard", "dice", "overlap"]
_AnyMask = Mask | ShardedMask


class OverlapSummary(TypedDict):
    """Counts behind an overlap; weights are those of the compared layers.

    Attributes:
        total_intersection: Weights that both masks keep.
        total_union: Weights that at least one keeps.
        total_params_mask1: Weights that the first keeps.
        total_params_mask2: Weights that the second keeps.
        sparsity_mask1: Fraction that the first removes.
        sparsity_mask2: Fraction that the second removes.
        layers_processed: Layers compared.
        layers_skipped: Layers that only one mask has, or whose shapes differ.
        layers_mask1: Layers of the first mask.
        layers_mask2: Layers of the second mask.
    """

    total_intersection: int
    total_union: int
    total_params_mask1: int
    total_params_mask2: int
    sparsity_mask1: float
    sparsity_mask2: float
    layers_processed: int
    layers_skipped: int
    layers_mask1: int
    layers_mask2: int


class TicketOverlap(TypedDict):
    """What `compute_ticket_overlap` returns.

    Attributes:
        method: "jaccard", "dice" or "overlap".
        overall_overlap: Over all compared layers together, in [0, 1].
        layer_overlaps: Parameter name to the overlap within that tensor.
        expected_by_chance: The same measure at the mean intersection of two independent random masks that keep as
            many weights of each layer; exact for "dice" and "overlap", to first order for "jaccard".
        excess: `overall_overlap - expected_by_chance`.
        z_score: Standard deviations of the intersection above its mean under that chance; the same for every
            method. None where chance leaves no choice (every layer all kept or all removed in one mask).
        warnings: One sentence for each skipped layer.
        skipped_layers: Their names, sorted.
        summary: The counts.
    """

    method: OverlapMethod
    overall_overlap: float
    layer_overlaps: dict[str, float]
    expected_by_chance: float
    excess: float
    z_score: float | None
    warnings: list[str]
    skipped_layers: list[str]
    summary: OverlapSummary


def compute_ticket_overlap(
    mask1: Mapping[str, torch.Tensor],
    mask2: Mapping[str, torch.Tensor],
    method: OverlapMethod = "jaccard",
    *,
    strict: bool = False,
) -> TicketOverlap:
    """Overlap of the weights that two tickets keep, beside what chance would give.

    With A and B the sets of kept weights: Jaccard `|A and B| / |A or B|`, Dice `2 |A and B| / (|A| + |B|)`,
    overlap coefficient `|A and B| / min(|A|, |B|)`; 1.0 if both are empty, 0.0 if one is. Two masks that keep
    most weights overlap whatever they are, so the result says what independent random masks of the same
    densities, layer by layer, would reach: a layer of n weights of which they keep a and b then has a
    hypergeometric intersection of mean `a b / n` and variance `a b (n - a)(n - b) / (n^2 (n - 1))`.

    Counts are Python integers, made on the packed bits. The two masks may change places. Those of sharded models
    are counted where they lie, and every rank gets the same result.

    Args:
        mask1: A `Mask` or a plain dict of tensors; a `ShardedMask` on all of its ranks.
        mask2: Another.
        method: "jaccard", "dice" or "overlap".
        strict: Refuse masks that differ in layers or shapes, instead of skipping those layers.

    Returns:
        A `TicketOverlap`.

    Raises:
        MaskMismatchError: No layer in common; with `strict`, any layer that cannot be compared; two masks of
            models that are sharded in different ways.
        EvaluationError: An unknown method.
        DistributedError: A rank of a `ShardedMask` failed or has gone.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_ticket_overlap
        >>> a = {"w": torch.tensor([1, 1, 1, 0, 0, 0])}
        >>> b = {"w": torch.tensor([0, 1, 1, 1, 0, 0])}
        >>> overlap = compute_ticket_overlap(a, b)
        >>> overlap["overall_overlap"], overlap["summary"]["total_union"]
        (0.5, 4)
        >>> compute_ticket_overlap(a, b, "dice")["expected_by_chance"]
        0.5

    References:
        Jaccard, "The distribution of the flora in the alpine zone", New Phytologist 11(2), 1912. Dice, "Measures
        of the amount of ecologic association between species", Ecology 26(3), 1945. Johnson, Kemp and Kotz,
        "Univariate Discrete Distributions", 3rd edition, 2005, section 6.3 (hypergeometric moments).
    """
    if method not in get_args(OverlapMethod):
        raise EvaluationError(f"method is 'jaccard', 'dice' or 'overlap', got {method!r}.")
    first, second = (one if isinstance(one, ShardedMask) else as_mask(one) for one in (mask1, mask2))
    unmatched = _unmatched(first, second)
    layers = _compared(first, second, unmatched)
    if unmatched and (strict or not layers):
        raise MaskMismatchError(
            ("The masks have no layer in common: " if not layers else "The masks cannot be compared whole: ")
            + " ".join(unmatched.values())
        )
    whole = _sum(list(layers.values()))
    expected = math.fsum(layer.expected for layer in layers.values())
    overall = _similarity(method, whole.common, whole.kept1, whole.kept2)
    by_chance = _similarity(method, expected, whole.kept1, whole.kept2)
    return TicketOverlap(
        method=method,
        overall_overlap=overall,
        layer_overlaps={
            name: _similarity(method, layer.common, layer.kept1, layer.kept2) for name, layer in layers.items()
        },
        expected_by_chance=by_chance,
        excess=overall - by_chance,
        z_score=_z_score(list(layers.values())),
        warnings=list(unmatched.values()),
        skipped_layers=list(unmatched),
        summary=OverlapSummary(
            total_intersection=whole.common,
            total_union=whole.kept1 + whole.kept2 - whole.common,
            total_params_mask1=whole.kept1,
            total_params_mask2=whole.kept2,
            sparsity_mask1=whole.sparsity(whole.kept1),
            sparsity_mask2=whole.sparsity(whole.kept2),
            layers_processed=len(layers),
            layers_skipped=len(unmatched),
            layers_mask1=len(first),
            layers_mask2=len(second),
        ),
    )


@dataclass(frozen=True)
class _Counts:
    """Two sets of kept weights within `numel`."""

    numel: int
    kept1: int
    kept2: int
    common: int

    @property
    def expected(self) -> float:
        """Mean intersection of random sets of these sizes."""
        return self.kept1 * self.kept2 / self.numel if self.numel else 0.0

    @property
    def deviation(self) -> float:
        """Intersection less its mean; subtracted as integers, so that nothing is lost."""
        return (self.common * self.numel - self.kept1 * self.kept2) / self.numel if self.numel else 0.0

    @property
    def variance(self) -> float:
        """Variance of the intersection of random sets of these sizes."""
        n, a, b = self.numel, self.kept1, self.kept2
        return a * b * (n - a) * (n - b) / (n * n * (n - 1)) if n > 1 else 0.0

    def sparsity(self, kept: int) -> float:
        return (self.numel - kept) / self.numel if self.numel else 0.0


def _unmatched(first: _AnyMask, second: _AnyMask) -> dict[str, str]:
    """Layers that cannot be compared, each with the reason."""
    reasons, both = {}, {*first.names} & {*second.names}
    for name in sorted({*first.names, *second.names}):
        if name not in both:
            reasons[name] = f"{name}: only in {'mask1' if name in first.names else 'mask2'}."
        elif first.shapes[name] != second.shapes[name]:
            shapes = tuple(first.shapes[name]), tuple(second.shapes[name])
            reasons[name] = f"{name}: shapes differ, {shapes[0]} in mask1 and {shapes[1]} in mask2."
    return reasons


def _compared(first: _AnyMask, second: _AnyMask, unmatched: Mapping[str, str]) -> dict[str, _Counts]:
    numels, kept1, kept2 = first.layer_numel(), first.layer_kept(), second.layer_kept()
    common = _common(first, second, [name for name in numels if name not in unmatched])
    return {name: _Counts(numels[name], kept1[name], kept2[name], count) for name, count in common.items()}


def _common(first: _AnyMask, second: _AnyMask, names: Sequence[str]) -> dict[str, int]:
    """How many weights both keep, layer by layer."""
    if isinstance(first, ShardedMask):
        return first.common_kept(second, names)
    if isinstance(second, ShardedMask):
        return second.common_kept(first, names)
    return {name: count_common(first.packed(name), second.packed(name)) for name in names}


def _sum(layers: Sequence[_Counts]) -> _Counts:
    return _Counts(
        numel=sum(layer.numel for layer in layers),
        kept1=sum(layer.kept1 for layer in layers),
        kept2=sum(layer.kept2 for layer in layers),
        common=sum(layer.common for layer in layers),
    )


def _similarity(method: OverlapMethod, common: float, kept1: int, kept2: int) -> float:
    """The measure for an intersection of this size, an integer or a mean."""
    if not kept1 or not kept2:
        return 1.0 if kept1 == kept2 else 0.0
    if method == "jaccard":
        return common / (kept1 + kept2 - common)
    if method == "dice":
        return 2 * common / (kept1 + kept2)
    return common / min(kept1, kept2)


def _z_score(layers: Sequence[_Counts]) -> float | None:
    variance = math.fsum(layer.variance for layer in layers)
    return math.fsum(layer.deviation for layer in layers) / math.sqrt(variance) if variance else None
