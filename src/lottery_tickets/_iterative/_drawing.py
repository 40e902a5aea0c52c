"""A mask inside an earlier one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lottery_tickets._iterative._schedule import Group
from lottery_tickets.errors import WeightsError
from lottery_tickets.masks import Mask, PackedBits, ShardedMask, is_sharded
from lottery_tickets.sparsity import Ranked, extremes, parts_of, warn_of_collapse
from lottery_tickets.training import part_of

ScoreFunction = Callable[[nn.Module], Mapping[str, torch.Tensor]]


def draw(
    weights: Mapping[str, torch.Tensor],
    earlier: Mask | ShardedMask | None,
    groups: Sequence[Group],
    number: int,
    scores: Mapping[str, torch.Tensor] | None = None,
) -> Mask:
    """The mask of a round: of each group, those go that went before and the smallest of the others.

    Args:
        weights: Prunable tensors by name, pruned ones zero; of a model in parts DTensors.
        earlier: The mask of the round before; None if nothing is pruned.
        groups: What is ranked together, and how many go.
        number: Of the round.
        scores: What ranks in place of the magnitude; written to. Of a model in parts, what this rank has of them.

    Returns:
        The mask, sharded as the weights are.

    Raises:
        WeightsError: NaN among what is ranked; nothing has been drawn.

    Warns:
        LayerCollapseWarning: A tensor of several ranked together lost all its weights.
    """
    parts = parts_of(weights)
    ranked, division = (parts["tensors"] if scores is None else scores), parts["division"]
    extremes(ranked, division=division)
    bits: dict[str, PackedBits] = {}
    with _holes_below_everything(ranked, earlier):
        for group in groups:
            members = {name: ranked[name] for name in group.names}
            selector = Ranked(members, nan="prune", division=division).selector(members)
            bits |= selector.bits(selector.lines([group.removed[number]])[0])
    mask = Ranked(ranked, division=division).mask({name: bits[name] for name in weights})
    warn_of_collapse([mask], stacklevel=2)
    return mask


def scores_of(criterion: ScoreFunction, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What a user's criterion says of these weights, in memory of its own.

    Of weights in parts it is asked for DTensors sharded as they are, or for whole tensors, the same on every rank;
    what comes back is what this rank has of them.

    Raises:
        WeightsError: Scores that are missing or of another shape.
    """
    given = criterion(model)
    for name, weight in weights.items():
        if name not in given or given[name].shape != weight.shape:
            came = f"shape {tuple(given[name].shape)}" if name in given else "nothing"
            raise WeightsError(
                f"criterion: {name} needs scores of shape {tuple(weight.shape)}, got {came}. Return a score for "
                "every prunable weight, or leave the tensor out with exclude."
            )
    return {name: _own(name, given[name].detach(), weight) for name, weight in weights.items()}


def _own(name: str, score: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return part_of(name, score, weight) if is_sharded(weight) else score.clone()


@contextmanager
def _holes_below_everything(
    ranked: Mapping[str, torch.Tensor], earlier: Mask | ShardedMask | None
) -> Iterator[None]:
    """Where the earlier mask has holes there is NaN in the block and zero after it.

    A weight that was kept may be zero too, and one that was pruned must not take its place. NaN, which no weight
    is, ranks below all of them and needs no memory.
    """
    if earlier is None:
        yield
        return
    try:
        _fill(ranked, earlier, float("nan"))
        yield
    finally:
        _fill(ranked, earlier, 0.0)


def _fill(tensors: Mapping[str, torch.Tensor], mask: Mask | ShardedMask, value: float) -> None:
    for name, tensor in tensors.items():
        tensor.detach().masked_fill_(~mask[name].to(tensor.device), value)
