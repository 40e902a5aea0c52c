"""How much goes where: numbers of weights to remove, and lines that respect a floor under every tensor.

Every rule of allocation says what share of its weights a tensor keeps, up to one unknown x that the total settles:
a line `base + slope * x`, never less than the least a tensor keeps and never more than it has. The x is solved in
rational numbers, and the shares are rounded so that the total is exact: all down, then those with the largest
remainders up, earlier tensors first. Shares only fall when the sparsity rises. Their roundings may differ by one
from that: a left-over goes to whoever has the largest remainder, and with one weight more to remove that may be
another tensor (apportionment knows it as the Alabama paradox). Where every share moves by a weight or more, none
goes the wrong way.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from numbers import Real
from typing import Protocol, cast

from lottery_tickets.errors import SparsityError
from lottery_tickets.masks import PackedBits
from lottery_tickets.sparsity._selection import Line


class Selector(Protocol):
    """Draws lines through weights and packs what lies above them: by counting or by sorting."""

    def lines(self, ranks: Sequence[int]) -> list[Line]:
        """Lines below which exactly these numbers of weights lie."""

    def bits(self, line: Line) -> dict[str, PackedBits]:
        """Packed bits of the weights above a line."""

    def bits_of_each(self, lines: Sequence[Line]) -> list[dict[str, PackedBits]]:
        """Packed bits of the weights above each line."""


# Of the tensors with these names.
MakeSelector = Callable[[Collection[str]], Selector]


def one_or_many(asked: float | Iterable[float]) -> tuple[list[float], bool]:
    """The numbers as a list, and whether there was one alone; what is neither is taken for one, to be refused."""
    if isinstance(asked, Iterable) and not isinstance(asked, str) and getattr(asked, "ndim", 1) != 0:
        return list(asked), False
    return [cast(float, asked)], True


def is_fraction(number: object) -> bool:
    """Whether this is a real number in [0, 1], Python's or numpy's."""
    return isinstance(number, Real) and not isinstance(number, bool) and 0 <= float(number) <= 1


def check_sparsity(sparsity: float, what: str = "sparsity") -> float:
    """The sparsity, if it is a number in [0, 1).

    Raises:
        SparsityError: Anything else.
    """
    if not is_fraction(sparsity) or sparsity == 1:
        raise SparsityError(
            f"{what} is the fraction removed, a number in [0, 1); got {sparsity!r}. "
            "For 90 percent pass 0.9; a mask that keeps nothing is no ticket."
        )
    return float(sparsity)


def removed_count(sparsity: float, numel: int) -> int:
    """How many of `numel` weights a sparsity removes: `round(sparsity * numel)`."""
    return round(sparsity * numel)


def bits_above_floor(
    numels: Mapping[str, int], removed: int, min_density: float, make: MakeSelector
) -> dict[str, PackedBits]:
    """Packed bits with exactly `removed` weights gone of tensors with so many, each tensor keeping its share.

    One line is drawn through all tensors. Those that would lose too much are set apart with the most they may
    lose, and the line is drawn again through the others with what is left to remove. The line only rises, so a
    tensor set apart stays so, and higher sparsities give subsets.

    Raises:
        SparsityError: The floors leave fewer weights than are to be removed.
    """
    most = {name: numel - math.ceil(Fraction(str(min_density)) * numel) for name, numel in numels.items()}
    if removed > sum(most.values()):
        raise SparsityError(
            f"Cannot remove {removed} weights: min_density={min_density} lets at most {sum(most.values())} go. "
            "Lower the sparsity or the floor."
        )
    free = list(numels)
    bits: dict[str, PackedBits] = {}
    while True:
        selector = make(free)
        (line,) = selector.lines([removed])
        crowded = [name for name in free if line.removed[name] > most[name]]
        if not crowded:
            return bits | selector.bits(line)
        for name in crowded:
            free.remove(name)
            alone = make([name])
            bits |= alone.bits(alone.lines([most[name]])[0])
            removed -= most[name]


def removals_by_weight(numels: Mapping[str, int], weights: Mapping[str, float], removed: int) -> dict[str, int]:
    """Spread a number of removals so that each tensor's density is proportional to its weight.

    Densities are capped at 1, what the cap frees goes to the others in proportion, and the left-over of rounding
    to those with the largest remainders, so that the total is exact. Weights are positive.
    """
    slopes = {name: Fraction(weights[name]) * numel for name, numel in numels.items()}
    return _spread(numels, {name: (Fraction(0), slope) for name, slope in slopes.items()}, removed, least=0)


def uniform_removals(numels: Mapping[str, int], removed: int) -> dict[str, int]:
    """The same density for every tensor; each keeps at least one weight.

    Raises:
        SparsityError: More is to go than that leaves.
    """
    return _spread(numels, {name: (Fraction(0), Fraction(numel)) for name, numel in numels.items()}, removed)


def erk_removals(shapes: Mapping[str, Sequence[int]], removed: int) -> dict[str, int]:
    """Erdos-Renyi-Kernel: density proportional to `sum(shape) / prod(shape)`, at most 1.

    Tensors whose density would pass 1 stay dense and the factor is found again for the others, until none does.
    Each tensor keeps at least one weight.

    Raises:
        SparsityError: More is to go than that leaves.
    """
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    ramps = {name: (Fraction(0), Fraction(sum(shape) or 1)) for name, shape in shapes.items()}
    return _spread(numels, ramps, removed)


def outlier_removals(
    numels: Mapping[str, int], outliers: Mapping[str, Fraction], removed: int, band: float
) -> dict[str, int]:
    """OWL: sparsity falls with the share of outliers in a straight line, within `band` of the mean sparsity.

    Args:
        numels: Name to number of weights.
        outliers: Name to the share D of outliers among the weights of its block.
        removed: How many weights go in all.
        band: The farthest any sparsity lies from the mean, lambda.

    Raises:
        SparsityError: More is to go than leaves each tensor one weight.
    """
    total = sum(numels.values())
    mean = sum((outliers[name] * numel for name, numel in numels.items()), Fraction(0)) / max(total, 1)
    farthest = max((abs(outliers[name] - mean) for name in numels if numels[name]), default=Fraction(0))
    factor = Fraction(str(band)) / farthest if farthest else Fraction(0)
    ramps = {name: (factor * (outliers[name] - mean) * numel, Fraction(numel)) for name, numel in numels.items()}
    return _spread(numels, ramps, removed)


def given_removals(numels: Mapping[str, int], given: Mapping[str, float], removed: int) -> dict[str, int]:
    """The sparsities of a `{glob: sparsity}`; tensors that no glob matches take the rest, all at one density.

    Raises:
        SparsityError: A glob that matches nothing, a tensor that two match, a sparsity outside [0, 1), or a total
            that the others cannot make up for.
    """
    matched = _matched(numels, given)
    shares = {
        name: min(Fraction(str(float(given[glob]))) * numels[name], Fraction(max(numels[name] - 1, 0)))
        for name, glob in matched.items()
    }
    others = {name: numel for name, numel in numels.items() if name not in shares}
    if not others:
        asked = sum(shares.values(), Fraction(0))
        if not math.floor(asked) <= removed <= math.ceil(asked):
            raise SparsityError(
                f"allocation names every tensor, and removes {float(asked):.0f} weights in all, not {removed}. "
                f"Pass sparsity={float(asked / max(sum(numels.values()), 1))!r}, or leave a tensor unnamed to "
                "take the rest."
            )
        return _rounded(shares, removed)
    removals = {name: min(round(share), max(numels[name] - 1, 0)) for name, share in shares.items()}
    left = removed - sum(removals.values())
    if not 0 <= left <= _most(others, 1):
        raise SparsityError(
            f"allocation removes {removed - left} weights where it names a sparsity, so {left} of the "
            f"{sum(others.values())} in the other tensors would have to go for {removed} in all; between 0 and "
            f"{_most(others, 1)} can. Change the sparsity or the allocation."
        )
    removals |= uniform_removals(others, left)
    return {name: removals[name] for name in numels}


def _matched(names: Iterable[str], given: Mapping[str, float]) -> dict[str, str]:
    """Name to the glob that matches it."""
    matched: dict[str, str] = {}
    for glob, sparsity in given.items():
        check_sparsity(sparsity, f"allocation[{glob!r}]")
        found = [name for name in names if fnmatchcase(name, glob)]
        if not found:
            raise SparsityError(
                f"allocation: {glob!r} matches none of the tensors; names look like "
                f"{next(iter(names), 'nothing')!r}."
            )
        for name in found:
            if name in matched:
                raise SparsityError(
                    f"allocation: {matched[name]!r} and {glob!r} both match {name}; one sparsity a tensor."
                )
        matched |= dict.fromkeys(found, glob)
    return matched


def _spread(
    numels: Mapping[str, int], ramps: Mapping[str, tuple[Fraction, Fraction]], removed: int, *, least: int = 1
) -> dict[str, int]:
    """Removals of the given total, when a tensor keeps `base + slope * x` within what it has and the least."""
    most = _most(numels, least)
    if removed > most:
        raise SparsityError(
            f"Cannot remove {removed} of {sum(numels.values())} weights: every tensor keeps at least {least}, so "
            f"at most {most} can go. Lower the sparsity, or leave small tensors out."
        )
    filled = {name: (*ramp, min(least, numels[name]), numels[name]) for name, ramp in ramps.items()}

    def kept_at(x: Fraction) -> dict[str, Fraction]:
        return {
            name: min(Fraction(numel), max(Fraction(floor), base + slope * x))
            for name, (base, slope, floor, numel) in filled.items()
        }

    def total_at(x: Fraction) -> Fraction:
        return sum(kept_at(x).values(), Fraction(0))

    # Between bends the total is a straight line, so two of them around the total give x exactly.
    bends = sorted(
        {(end - base) / slope for base, slope, floor, numel in filled.values() if numel for end in (floor, numel)}
    )
    if not bends:
        return dict.fromkeys(numels, 0)
    kept = Fraction(sum(numels.values()) - removed)
    after = min(bisect_left(bends, kept, key=total_at), len(bends) - 1)
    x = bends[after]
    if after and total_at(x) != kept:
        low, high = total_at(bends[after - 1]), total_at(x)
        x = bends[after - 1] + (x - bends[after - 1]) * (kept - low) / (high - low)
    return _rounded({name: numels[name] - share for name, share in kept_at(x).items()}, removed)


def _most(numels: Mapping[str, int], least: int) -> int:
    """How many weights can go when every tensor keeps this many, or all if it has fewer."""
    return sum(max(numel - least, 0) for numel in numels.values())


def _rounded(exact: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Integers of the given total nearest to the exact shares: the largest remainders are rounded up."""
    rounded = {name: math.floor(share) for name, share in exact.items()}
    left = total - sum(rounded.values())
    for name in sorted(exact, key=lambda name: rounded[name] - exact[name])[:left]:
        rounded[name] += 1
    return rounded
