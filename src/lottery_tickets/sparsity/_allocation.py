"""How much goes where: numbers of weights to remove, and lines that respect a floor under every tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from typing import Protocol, cast

import torch

from lottery_tickets.errors import SparsityError
from lottery_tickets.masks import PackedBits
from lottery_tickets.sparsity._selection import Line


class Selector(Protocol):
    """Draws lines through weights and packs what lies above them: by counting or by sorting."""

    def lines(self, ranks: Sequence[int]) -> list[Line]:
        """Lines below which exactly these numbers of weights lie."""

    def bits(self, line: Line) -> dict[str, PackedBits]:
        """Packed bits of the weights above a line."""


MakeSelector = Callable[[Mapping[str, torch.Tensor]], Selector]


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
    tensors: Mapping[str, torch.Tensor], removed: int, min_density: float, make: MakeSelector
) -> dict[str, PackedBits]:
    """Packed bits with exactly `removed` weights gone in all, and each tensor keeping its share.

    One line is drawn through all tensors. Those that would lose too much are set apart with the most they may
    lose, and the line is drawn again through the others with what is left to remove. The line only rises, so a
    tensor set apart stays so, and higher sparsities give subsets.

    Raises:
        SparsityError: The floors leave fewer weights than are to be removed.
    """
    most = {
        name: tensor.numel() - math.ceil(Fraction(str(min_density)) * tensor.numel())
        for name, tensor in tensors.items()
    }
    if removed > sum(most.values()):
        raise SparsityError(
            f"Cannot remove {removed} weights: min_density={min_density} lets at most {sum(most.values())} go. "
            "Lower the sparsity or the floor."
        )
    free = dict(tensors)
    bits: dict[str, PackedBits] = {}
    while True:
        selector = make(free)
        (line,) = selector.lines([removed])
        crowded = [name for name in free if line.removed[name] > most[name]]
        if not crowded:
            return bits | selector.bits(line)
        for name in crowded:
            alone = make({name: free.pop(name)})
            bits |= alone.bits(alone.lines([most[name]])[0])
            removed -= most[name]


def removals_by_weight(numels: Mapping[str, int], weights: Mapping[str, float], removed: int) -> dict[str, int]:
    """Spread a number of removals so that each tensor's density is proportional to its weight.

    Densities are capped at 1, what the cap frees goes to the others in proportion, and the left-over of rounding
    to those with the largest remainders, so that the total is exact. Weights are positive.
    """
    kept = sum(numels.values()) - removed
    densities: dict[str, Fraction] = {}
    open_names = [name for name in numels if numels[name]]
    shares = {name: Fraction(weights[name]) for name in open_names}
    while open_names:
        budget = kept - sum(numels[name] for name in densities)
        scale = Fraction(budget) / sum(shares[name] * numels[name] for name in open_names)
        full = [name for name in open_names if scale * shares[name] >= 1]
        if not full:
            densities |= {name: scale * shares[name] for name in open_names}
            break
        densities |= dict.fromkeys(full, Fraction(1))
        open_names = [name for name in open_names if name not in full]
    exact = {name: (1 - densities.get(name, Fraction(1))) * numel for name, numel in numels.items()}
    return _rounded(exact, removed)


def _rounded(exact: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Integers of the given total nearest to the exact shares: the largest remainders are rounded up."""
    rounded = {name: math.floor(share) for name, share in exact.items()}
    left = total - sum(rounded.values())
    for name in sorted(exact, key=lambda name: rounded[name] - exact[name])[:left]:
        rounded[name] += 1
    return rounded
