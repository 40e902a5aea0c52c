"""Masks from what weights rank by: one threshold or many, numbers by tensor, by row, or a pattern."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Literal, get_args

import numpy as np
import torch

from lottery_tickets.errors import LayerCollapseWarning, SparsityError, WeightsError
from lottery_tickets.masks import Division, Mask, PackedBits
from lottery_tickets.sparsity._allocation import (
    bits_above_floor,
    check_sparsity,
    erk_removals,
    given_removals,
    one_or_many,
    outlier_removals,
    removed_count,
    uniform_removals,
)
from lottery_tickets.sparsity._blocks import Pages, rankable, reading_ahead, refuse_nan
from lottery_tickets.sparsity._lamp import lamp_removals
from lottery_tickets.sparsity._outliers import outlier_shares
from lottery_tickets.sparsity._patterns import NMPattern, bits_by_pattern
from lottery_tickets.sparsity._pieces import bits_by_pattern_among, bits_by_row_among
from lottery_tickets.sparsity._ranked import Ranked
from lottery_tickets.sparsity._rows import bits_by_row

Scope = Literal["global", "layer", "row"]
NamedAllocation = Literal["global", "uniform", "erk", "lamp", "owl"]
Allocation = NamedAllocation | Mapping[str, float] | None
PatternRemainder = Literal["error", "dense"]


@dataclass(frozen=True)
class Rule:
    """How removals are spread, checked to mean one thing.

    Attributes:
        scope: What is compared: all weights, those of a tensor, or those of an output row.
        allocation: What says how many each tensor loses; None for the scope itself.
        pattern: "N:M", which leaves nothing to spread.
        pattern_remainder: What becomes of tensors that the pattern does not divide.
        min_density: Floor under the tensors of a threshold.
        owl_threshold: What times the mean makes an outlier.
        owl_lambda: How far a sparsity may lie from the mean one.

    Raises:
        SparsityError: A value that is not known, or two that contradict each other.
    """

    scope: Scope = "global"
    allocation: Allocation = None
    pattern: str | None = None
    pattern_remainder: PatternRemainder = "error"
    min_density: float | None = None
    owl_threshold: float = 5.0
    owl_lambda: float = 0.08

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _check_known("scope", self.scope, get_args(Scope))
        _check_known("pattern_remainder", self.pattern_remainder, get_args(PatternRemainder))
        if self.allocation is not None and not isinstance(self.allocation, Mapping):
            _check_known("allocation", self.allocation, get_args(NamedAllocation), "a dict {glob: sparsity}")
        if self.min_density is not None:
            check_sparsity(self.min_density, "min_density")
        _check_positive("owl_threshold", self.owl_threshold)
        _check_positive("owl_lambda", self.owl_lambda)
        if self.pattern is not None:
            NMPattern.parse(self.pattern)
        for first, second, why in self._contradictions():
            raise SparsityError(f"{first} and {second} contradict each other: {why}. Leave one of them out.")

    def __str__(self) -> str:
        """What is not at its default, for the log."""
        told = [f"scope {self.scope}"] if self.pattern is None else [f"pattern {self.pattern}"]
        told += [f"allocation {self.allocation}"] if self.allocation is not None else []
        told += [f"min_density {self.min_density}"] if self.min_density is not None else []
        return ", ".join(told)

    def _contradictions(self) -> list[tuple[str, str, str]]:
        scope, allocation = f"scope={self.scope!r}", f"allocation={self.allocation!r}"
        pattern, floor = f"pattern={self.pattern!r}", f"min_density={self.min_density!r}"
        fixed = "a pattern says how many of every group stay"
        counted = "the number that each tensor loses is settled without a threshold to hold back"
        found = [
            (self.pattern and self.allocation is not None, pattern, allocation, fixed),
            (self.pattern and self.scope != "global", pattern, scope, fixed),
            (self.pattern and self.min_density is not None, pattern, floor, fixed),
            (
                self.allocation is not None and self.scope == "layer",
                *(allocation, scope, "both say how many each tensor loses"),
            ),
            (
                self.allocation in ("global", "lamp") and self.scope == "row",
                *(allocation, scope, "one threshold for all tensors, or one for every row"),
            ),
            (
                self.min_density is not None and self.allocation not in (None, "global"),
                *(floor, allocation, counted),
            ),
            (self.min_density is not None and self.scope == "row", floor, scope, counted),
        ]
        return [(first, second, why) for holds, first, second, why in found if holds]

    @property
    def by_threshold(self) -> bool:
        """Whether one threshold for all tensors decides."""
        return self.scope == "global" and self.pattern is None and self.allocation in (None, "global")


def draw_masks(ranked: Ranked, sparsity: float | Sequence[float] | None, rule: Rule) -> tuple[list[Mask], bool]:
    """A mask for each sparsity, sharded as the weights are, and whether one alone was asked for.

    Raises:
        SparsityError: A sparsity outside [0, 1) or other than the pattern's, or one that cannot be met.
        WeightsError: NaN, or weights that have no magnitudes to rank.
        DistributedError: Another rank failed.
    """
    with ranked.together(f"sparsity={sparsity}, {rule}, nan={ranked.nan!r}"):
        bits, single = _drawn(ranked, sparsity, rule)
        return [ranked.mask(found) for found in bits], single


def _drawn(
    ranked: Ranked, sparsity: float | Sequence[float] | None, rule: Rule
) -> tuple[list[dict[str, PackedBits]], bool]:
    sparsities, single = _sparsities(sparsity, rule)
    ranked = replace(ranked, tensors=rankable(ranked.tensors))
    if rule.pattern is not None:
        bits = [_bits_by_pattern(ranked, NMPattern.parse(rule.pattern), rule.pattern_remainder)] * len(sparsities)
    elif rule.scope != "row" and rule.allocation in (None, "global"):
        bits = _bits_by_scope(ranked, sparsities, rule)
    else:
        bits = [_bits_by_number(ranked, removals, rule) for removals in _allocate(ranked, sparsities, rule)]
    return bits, single


def extremes(
    tensors: Mapping[str, torch.Tensor], *, pages: Pages | None = None, division: Division | None = None
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each tensor that has any, in one pass that copies nothing.

    Args:
        tensors: Name to weights or scores.
        pages: What is told where weights will be read, if they lie in files.
        division: How tensors of which these are parts are spread over ranks, all of which then make this call;
            the values are those of whole tensors.

    Raises:
        WeightsError: NaN, named with its tensors and counts.
    """
    filled = [(name, tensor) for name, tensor in rankable(tensors).items() if tensor.numel()]
    found = {}
    with reading_ahead(pages, [tensor for _, tensor in filled]) as reading:
        for turn, (name, tensor) in enumerate(filled):
            with reading(turn):
                low, high = torch.aminmax(tensor)
            found[name] = (float(low), float(high))
    if division is not None:
        found = _widest(division.ranks.gather(found), tensors)
    holding = {name: tensors[name] for name, (low, _) in found.items() if math.isnan(low)}
    if holding:
        refuse_nan(_counts_of_nan(holding, division))
    return found


def _widest(
    theirs: Sequence[Mapping[str, tuple[float, float]]], names: Iterable[str]
) -> dict[str, tuple[float, float]]:
    """Extremes over ranks, some of which have none of a tensor; NaN where one has NaN."""
    found = {}
    for name in names:
        ends = [one[name] for one in theirs if name in one]
        if ends:
            lows, highs = np.array(ends).T
            found[name] = (float(lows.min()), float(highs.max()))
    return found


def warn_of_collapse(masks: Sequence[Mask], stacklevel: int = 3) -> None:
    """Warn the caller's caller of tensors that lost all their weights."""
    emptied = {}
    for mask in masks:
        numels = mask.layer_numel()
        names = [name for name, kept in mask.layer_kept().items() if not kept and numels[name]]
        if names:
            emptied[round(mask.sparsity, 6)] = names
    if emptied:
        listed = "; ".join(f"sparsity {sparsity}: {', '.join(names)}" for sparsity, names in emptied.items())
        warnings.warn(
            f"Layer collapse: the global threshold removed every weight of a tensor ({listed}). "
            "min_density keeps a share of each.",
            LayerCollapseWarning,
            stacklevel=stacklevel,
        )


def _sparsities(sparsity: float | Sequence[float] | None, rule: Rule) -> tuple[list[float], bool]:
    if rule.pattern is None:
        sparsities, single = one_or_many(sparsity)  # type: ignore[arg-type]
        return [check_sparsity(one) for one in sparsities], single
    given = NMPattern.parse(rule.pattern).sparsity
    sparsities, single = one_or_many(given if sparsity is None else sparsity)
    for one in sparsities:
        if abs(check_sparsity(one) - given) > 1e-3:
            raise SparsityError(
                f"pattern={rule.pattern!r} removes {given:.4g} of the weights, and sparsity says {one!r}. "
                f"Pass sparsity={given:.4g} or None."
            )
    return sparsities, single


def _bits_by_scope(ranked: Ranked, sparsities: Sequence[float], rule: Rule) -> list[dict[str, PackedBits]]:
    numels = ranked.numels
    groups = [numels] if rule.scope == "global" else [{name: numel} for name, numel in numels.items()]
    bits: list[dict[str, PackedBits]] = [{} for _ in sparsities]
    for group in groups:
        removals = [removed_count(sparsity, sum(group.values())) for sparsity in sparsities]
        for found, drawn in zip(bits, _bits_of_group(ranked, group, removals, rule.min_density), strict=True):
            found.update(drawn)
    return bits


def _bits_of_group(
    ranked: Ranked, group: Mapping[str, int], removals: Sequence[int], min_density: float | None
) -> list[dict[str, PackedBits]]:
    if min_density is not None:
        return [bits_above_floor(group, removed, min_density, ranked.selector) for removed in removals]
    selector = ranked.selector(group)
    return selector.bits_of_each(selector.lines(removals))


def _allocate(ranked: Ranked, sparsities: Sequence[float], rule: Rule) -> list[dict[str, int]]:
    """How many weights each tensor loses, for each sparsity."""
    numels, shapes = ranked.numels, ranked.shapes
    removals = [removed_count(sparsity, sum(numels.values())) for sparsity in sparsities]
    allocation = rule.allocation
    if isinstance(allocation, Mapping):
        return [given_removals(numels, allocation, removed) for removed in removals]
    if allocation == "erk":
        return [erk_removals(shapes, removed) for removed in removals]
    if allocation in ("lamp", "owl"):
        _check_summable(ranked, allocation)
        if allocation == "lamp":
            return lamp_removals(
                *(ranked.tensors, removals),
                pages=ranked.pages,
                division=ranked.division,
                progress=ranked.shown,
            )
        shares = outlier_shares(ranked.tensors, rule.owl_threshold, pages=ranked.pages, division=ranked.division)
        return [outlier_removals(numels, shares, removed, rule.owl_lambda) for removed in removals]
    return [uniform_removals(numels, removed) for removed in removals]


def _bits_by_number(ranked: Ranked, removals: Mapping[str, int], rule: Rule) -> dict[str, PackedBits]:
    bits: dict[str, PackedBits] = {}
    if rule.scope == "row":
        _refuse_nan(ranked)
    for name, tensor in ranked.tensors.items():
        if rule.scope != "row":
            selector = ranked.selector([name])
            bits |= selector.bits(selector.lines([removals[name]])[0])
            continue
        make, layout = ranked.weights, ranked.layout(name)
        if ranked.division is not None:
            bits[name] = bits_by_row_among(name, tensor, removals[name], make, layout, ranked.division)
        else:
            bits[name] = bits_by_row(name, tensor, removals[name], make, layout, progress=ranked.progress)
    return bits


def _bits_by_pattern(ranked: Ranked, pattern: NMPattern, remainder: PatternRemainder) -> dict[str, PackedBits]:
    shapes = ranked.shapes
    uneven = [name for name, shape in shapes.items() if not pattern.divides(shape, ranked.layout(name))]
    if uneven and remainder == "error":
        listed = ", ".join(f"{name} {tuple(shapes[name])}" for name in uneven)
        raise SparsityError(
            f"pattern '{pattern.kept}:{pattern.group}' needs input dimensions that {pattern.group} divides; "
            f"not so: {listed}. pattern_remainder='dense' keeps these whole, exclude= leaves them out."
        )
    _refuse_nan(ranked)
    whole = Mask.ones_like({name: ranked.tensors[name] for name in uneven})
    bits = {}
    for name, tensor in ranked.tensors.items():
        make, layout = ranked.weights, ranked.layout(name)
        if name in whole:
            bits[name] = whole.packed(name)
        elif ranked.division is not None:
            bits[name] = bits_by_pattern_among(name, tensor, pattern, make, layout, ranked.division)
        else:
            bits[name] = bits_by_pattern(make({name: tensor}), pattern, layout, progress=ranked.progress)
    return bits


def _refuse_nan(ranked: Ranked) -> None:
    """Look for NaN before anything is drawn, where that does not count."""
    if ranked.nan != "raise":
        return
    if ranked.division is None:
        extremes(ranked.tensors, pages=ranked.pages)
        return
    refuse_nan(_counts_of_nan(ranked.tensors, ranked.division))


def _counts_of_nan(tensors: Mapping[str, torch.Tensor], division: Division | None) -> dict[str, int]:
    """How many each whole tensor holds."""
    if division is None:
        return {name: _count_nan(tensor) for name, tensor in tensors.items()}
    counts = [_count_nan(tensor) if name in division.counted else 0 for name, tensor in tensors.items()]
    return dict(zip(tensors, division.ranks.sum(np.array(counts, np.int64)).tolist(), strict=True))


def _count_nan(tensor: torch.Tensor) -> int:
    """How many; only where there are some are they told apart, a byte for each weight."""
    if not tensor.numel() or not math.isnan(float(torch.aminmax(tensor).min)):
        return 0
    return int(tensor.isnan().sum())


def _check_summable(ranked: Ranked, allocation: str) -> None:
    """LAMP and OWL sum over a tensor, so they need numbers that have a sum, and that rank as they are."""
    if ranked.nan == "prune":
        raise SparsityError(
            f"allocation={allocation!r} and nan='prune' contradict each other: a sum with NaN in it is none. "
            "Repair the weights, or choose another allocation."
        )
    infinite = [
        name
        for name, (low, high) in extremes(ranked.tensors, pages=ranked.pages, division=ranked.division).items()
        if math.isinf(max(-low, high))
    ]
    if infinite:
        raise WeightsError(
            f"allocation={allocation!r} sums over each tensor, and there is inf in {', '.join(infinite)}. "
            "Repair it, or choose another allocation."
        )


def _check_known(name: str, value: object, known: Sequence[str], also: str | None = None) -> None:
    if value not in known:
        *first, last = [*map(repr, known), *([also] if also else [])]
        raise SparsityError(f"{name} is {', '.join(first)} or {last}, got {value!r}.")


def _check_positive(name: str, value: float) -> None:
    if not (isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and value > 0):
        raise SparsityError(f"{name} is a positive number; got {value!r}.")
