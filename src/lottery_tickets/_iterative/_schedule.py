"""How many weights are gone after each round, and among which they are chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise

from lottery_tickets.errors import SparsityError
from lottery_tickets.sparsity import removed_count, uniform_removals


@dataclass(frozen=True)
class Group:
    """Tensors that are ranked together.

    Attributes:
        names: Of the tensors.
        removed: How many of their weights are gone after round 0 (none), 1, 2 and so on.
    """

    names: tuple[str, ...]
    removed: tuple[int, ...]


def groups_of(
    numels: Mapping[str, int],
    *,
    rounds: int,
    target_sparsity: float,
    prune_fraction: float | None,
    layer_fractions: Mapping[str, float],
    by_layer: bool,
) -> list[Group]:
    """The groups, each with a number for every round.

    Without `prune_fraction`, the density after round i of n is (1 - s)^(i / n), which ends at the target. With it,
    each round removes that fraction of what is left. A tensor that `layer_fractions` names is a group of its own
    and loses that fraction of what is left of it; the others make up for the total where there is a target.

    Args:
        numels: Name of each prunable tensor to its number of weights.
        rounds: How many.
        target_sparsity: s; without account if there is a fraction.
        prune_fraction: Of the weights left, in (0, 1), or None.
        layer_fractions: Glob on names to the fraction of what is left of the tensor, in [0, 1).
        by_layer: Rank each tensor by itself.

    Raises:
        SparsityError: A glob that matches nothing, a tensor that two match, or a target that the tensors without a
            fraction of their own cannot make up for.
    """
    own = _fractions(numels, layer_fractions)
    named = [Group((name,), _shrinking(numels[name], rounds, fraction)) for name, fraction in own.items()]
    others = {name: numel for name, numel in numels.items() if name not in own}
    if not others:
        return named
    if prune_fraction is not None:
        parts = [(name,) for name in others] if by_layer else [tuple(others)]
        sizes = [sum(numels[name] for name in part) for part in parts]
        return named + [
            Group(part, _shrinking(size, rounds, prune_fraction)) for part, size in zip(parts, sizes, strict=True)
        ]
    if by_layer and not own:
        return [Group((name,), _towards(numel, rounds, target_sparsity)) for name, numel in others.items()]
    left = _left_over(_towards(sum(numels.values()), rounds, target_sparsity), named, sum(others.values()))
    return named + (_spread(others, left) if by_layer else [Group(tuple(others), tuple(left))])


def _towards(numel: int, rounds: int, sparsity: float) -> tuple[int, ...]:
    """Geometric densities that end exactly where one round would."""
    steps = [1 - (1 - sparsity) ** (number / rounds) for number in range(rounds)]
    return (*(removed_count(step, numel) for step in steps), removed_count(sparsity, numel))


def _shrinking(numel: int, rounds: int, fraction: float) -> tuple[int, ...]:
    return tuple(removed_count(1 - (1 - fraction) ** number, numel) for number in range(rounds + 1))


def _fractions(numels: Mapping[str, int], given: Mapping[str, float]) -> dict[str, float]:
    """Name of each tensor that a glob matches, in the order of the model, to its fraction."""
    matched: dict[str, str] = {}
    for glob in given:
        found = [name for name in numels if fnmatchcase(name, glob)]
        if not found:
            raise SparsityError(
                f"layer_fractions: {glob!r} matches none of the prunable tensors; names look like "
                f"{next(iter(numels), 'nothing')!r}."
            )
        for name in found:
            if name in matched:
                raise SparsityError(
                    f"layer_fractions: {matched[name]!r} and {glob!r} both match {name}; one fraction a tensor."
                )
            matched[name] = glob
    return {name: float(given[matched[name]]) for name in numels if name in matched}


def _left_over(total: Sequence[int], named: Sequence[Group], numel: int) -> list[int]:
    """What the tensors without a fraction of their own lose, after each round."""
    left = [all_ - sum(group.removed[number] for group in named) for number, all_ in enumerate(total)]
    wrong = [number for number, (one, after) in enumerate(pairwise(left), 1) if not one <= after <= numel]
    if wrong:
        raise SparsityError(
            f"layer_fractions and target_sparsity contradict each other: in round {wrong[0]} the {numel} weights "
            f"of the other tensors would go from {left[wrong[0] - 1]} removed to {left[wrong[0]]}. Change the "
            "fractions, the target or the number of rounds."
        )
    return left


def _spread(numels: Mapping[str, int], removed: Sequence[int]) -> list[Group]:
    """Every tensor loses the same share of what it has left in a round, the total being exact."""
    gone = [dict.fromkeys(numels, 0)]
    for before, after in pairwise(removed):
        last = gone[-1]
        there = {name: numel - last[name] for name, numel in numels.items()}
        lost = uniform_removals(there, after - before)
        gone.append({name: last[name] + lost[name] for name in numels})
    return [Group((name,), tuple(one[name] for one in gone)) for name in numels]
