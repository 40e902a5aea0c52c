"""Which units go: exact counts, nested over sparsities, ties by position."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import groupby
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets._structured._scores import Numbers
from lottery_tickets.errors import SparsityError
from lottery_tickets.masks import Kept, UnitGroup, Units, left_of
from lottery_tickets.sparsity import check_sparsity

Scope = Literal["global", "layer"]
NamedAllocation = Literal["global", "uniform"]
Allocation = NamedAllocation | Mapping[str, float] | None
Count = Literal["parameters", "units"]


@dataclass(frozen=True)
class Rule:
    """How removals are spread over groups, checked to mean one thing.

    Attributes:
        scope: One ranking for all groups, or each by itself, all losing the same share of their units.
        allocation: None or "global" for what the scope says, "uniform" for the same share, or {glob: share}.
        count: What the sparsity is a fraction of.
        min_units: Fewer are left in no group.
        round_to: Numbers of units left are multiples of this.

    Raises:
        SparsityError: A value that is not known, or two that contradict each other.
    """

    scope: Scope = "global"
    allocation: Allocation = None
    count: Count = "parameters"
    min_units: int = 1
    round_to: int | None = None

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        _check_known("scope", self.scope, get_args(Scope))
        _check_known("count", self.count, get_args(Count))
        if self.allocation is not None and not isinstance(self.allocation, Mapping):
            _check_known("allocation", self.allocation, get_args(NamedAllocation), "a dict {glob: sparsity}")
        for name, value in (("min_units", self.min_units), ("round_to", self.round_to)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SparsityError(
                    f"{name} is a positive integer, got {value!r}; a layer without units would cut the network."
                )
        if self.scope == "layer" and self.allocation not in (None, "uniform"):
            raise SparsityError(
                f"scope='layer' and allocation={self.allocation!r} contradict each other: both say how many units "
                "each layer loses. Leave one of them out."
            )

    @property
    def uniform(self) -> bool:
        """Whether every group loses the same share."""
        return self.scope == "layer" or self.allocation == "uniform"


@dataclass(frozen=True)
class _Chunk:
    """Units of one group that go at once.

    Attributes:
        group: Its number.
        score: Of the last of them.
        last: Its number.
        removed: How many of the group are gone with them.
        of: How many the group has.
    """

    group: int
    score: float
    last: int
    removed: int
    of: int


@dataclass
class Ranking:
    """Units in the order in which they go.

    Args:
        units: What is ranked.
        scores: A number for each unit, by group; the smallest go first.
        shapes: Of the parameters that units own a part of.
        rule: How removals are spread.
    """

    units: Units
    scores: Mapping[str, Numbers]
    shapes: Mapping[str, torch.Size]
    rule: Rule
    _orders: list[npt.NDArray[np.intp]] = field(init=False)

    def __post_init__(self) -> None:
        """Rank each group: ties by position, the earlier unit first."""
        self._orders = [np.argsort(self.scores[group.name], kind="stable") for group in self.units.groups]

    @property
    def numel(self) -> int:
        """What the sparsity is a fraction of: units, or the parameters that some unit owns a part of."""
        if self.rule.count == "units":
            return sum(group.count for group in self.units.groups)
        return sum(shape.numel() for shape in self.shapes.values())

    def kept(self, sparsities: Sequence[float]) -> list[dict[str, Kept]]:
        """For each sparsity the units that stay, by group.

        The most that do not pass `round(sparsity * N)` go, in one fixed order, so higher sparsities only add.

        Raises:
            SparsityError: More is to go than can.
        """
        given = _given(self.units.groups, self.rule)
        steps = self._steps(given)
        found = []
        for sparsity in sparsities:
            target = round(check_sparsity(sparsity) * self.numel)
            removed = self._removals(steps, target, given)
            found.append(self._kept(removed))
        return found

    def _removals(self, steps: list[list[_Chunk]], target: int, given: Mapping[int, int]) -> dict[int, int]:
        """How many units each group loses: those of the longest run of steps that fits."""
        if (fixed := self._cost(given)) > target:
            raise SparsityError(
                f"allocation removes {fixed} {self.rule.count} where it names a sparsity, and {target} are to go "
                "in all. Raise the sparsity or lower the allocation."
            )
        if (most := self._cost(_after(steps, len(steps), given))) < target:
            raise SparsityError(
                f"Cannot remove {target} of {self.numel} {self.rule.count}: with min_units={self.rule.min_units}"
                f"{'' if self.rule.round_to is None else f' and round_to={self.rule.round_to}'} at most {most} "
                f"can go. Ask for a sparsity of at most {math.floor(1e4 * most / max(1, self.numel)) / 1e4}."
            )
        low, high = 0, len(steps)
        while low < high:
            middle = (low + high + 1) // 2
            if self._cost(_after(steps, middle, given)) <= target:
                low = middle
            else:
                high = middle - 1
        return _after(steps, low, given)

    def _steps(self, given: Mapping[int, int]) -> list[list[_Chunk]]:
        chunks = [
            chunk
            for number, group in enumerate(self.units.groups)
            if number not in given
            for chunk in self._chunks(number, group)
        ]
        if not self.rule.uniform:
            return [[chunk] for chunk in sorted(chunks, key=lambda one: (one.score, one.group, one.last))]

        def share(chunk: _Chunk) -> Fraction:
            return Fraction(chunk.removed, chunk.of)

        return [list(step) for _, step in groupby(sorted(chunks, key=share), key=share)]

    def _chunks(self, number: int, group: UnitGroup) -> Iterable[_Chunk]:
        order, scores = self._orders[number], self.scores[group.name]
        for removed in _stops(group.count, self.rule.min_units, self.rule.round_to):
            last = int(order[removed - 1])
            yield _Chunk(number, float(scores[last]), last, removed, group.count)

    def _cost(self, removed: Mapping[int, int]) -> int:
        if self.rule.count == "units":
            return sum(removed.values())
        gone = self.units.gone(self._kept(removed))
        return self.numel - sum(
            math.prod(left_of(shape, gone.get(name, {}))) for name, shape in self.shapes.items()
        )

    def _kept(self, removed: Mapping[int, int]) -> dict[str, Kept]:
        found = {}
        for number, group in enumerate(self.units.groups):
            found[group.name] = np.ones(group.count, np.bool_)
            found[group.name][self._orders[number][: removed.get(number, 0)]] = False
        return found


def _stops(count: int, min_units: int, round_to: int | None) -> Iterable[int]:
    """Numbers of units that a group can lose, those above zero."""
    step = round_to or 1
    first = count % step or step
    return range(first, count - min_units + 1, step)


def _after(steps: Sequence[Sequence[_Chunk]], length: int, given: Mapping[int, int]) -> dict[int, int]:
    """How many units of each group are gone after so many steps."""
    removed = dict(given)
    for step in steps[:length]:
        for chunk in step:
            removed[chunk.group] = max(chunk.removed, removed.get(chunk.group, 0))
    return removed


def _given(groups: Sequence[UnitGroup], rule: Rule) -> dict[int, int]:
    """What an allocation by name takes from groups, whatever their scores: the most that fits its share."""
    if not isinstance(rule.allocation, Mapping):
        return {}
    found: dict[int, int] = {}
    for glob, share in rule.allocation.items():
        check_sparsity(share, f"allocation[{glob!r}]")
        matched = [number for number, group in enumerate(groups) if fnmatchcase(group.name, glob)]
        if not matched:
            raise SparsityError(
                f"allocation: {glob!r} matches no group of units; names look like "
                f"{groups[0].name if groups else 'nothing'!r}."
            )
        for number in matched:
            if number in found:
                raise SparsityError(f"allocation: two globs match {groups[number].name}; one sparsity a group.")
            most = round(share * groups[number].count)
            stops = _stops(groups[number].count, rule.min_units, rule.round_to)
            found[number] = max((stop for stop in stops if stop <= most), default=0)
    return found


def _check_known(name: str, value: object, known: Sequence[str], also: str | None = None) -> None:
    if value not in known:
        *first, last = [*map(repr, known), *([also] if also else [])]
        raise SparsityError(f"{name} is {', '.join(first)} or {last}, got {value!r}.")
