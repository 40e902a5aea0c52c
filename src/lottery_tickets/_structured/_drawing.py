"""From a model to masks of whole units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import nn

from lottery_tickets._structured._graph import read_structure
from lottery_tickets._structured._grouping import Structure
from lottery_tickets._structured._inputs import arguments
from lottery_tickets._structured._ranking import Ranking, Rule
from lottery_tickets._structured._scores import Criterion, unit_scores
from lottery_tickets.errors import StructureError
from lottery_tickets.masks import Kept, Kind, Mask, Units, units_metadata


def units_of(model: nn.Module, unit: str, example_inputs: Any = None, exclude: str | Sequence[str] = ()) -> Units:
    """The units of one kind that can leave a model, but for the groups that a glob matches.

    Raises:
        StructureError: A kind that is not known, a graph that cannot be traced, a glob that matches nothing, or no
            units of this kind.
    """
    if unit not in get_args(Kind):
        raise StructureError(f"unit is 'channel', 'head' or 'neuron', got {unit!r}.")
    args, kwargs = arguments(model, example_inputs)
    structure = read_structure(model, args, kwargs)
    found = structure.units.of_kind(unit)
    if not found.groups:
        raise StructureError(_none_found(model, unit, structure))
    return _without(found, [exclude] if isinstance(exclude, str) else list(exclude))


def _without(units: Units, globs: Sequence[str]) -> Units:
    names = [group.name for group in units.groups]
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise StructureError(f"exclude: {glob!r} matches no group of units; they are {', '.join(names)}.")
    left = tuple(group for group in units.groups if not any(fnmatchcase(group.name, glob) for glob in globs))
    if not left:
        raise StructureError(f"exclude={list(globs)!r} leaves no units of {', '.join(names)}.")
    return Units(left)


class Drawing:
    """Draws masks of a model's units, again and again as its weights change.

    Args:
        units: Those of the model.
        criterion: How they are ranked.
        rule: How removals are spread.
    """

    def __init__(self, units: Units, criterion: Criterion, rule: Rule) -> None:
        self.units = units
        self._criterion, self._rule = criterion, rule

    def scores(self, model: nn.Module) -> dict[str, Any]:
        """A score for each unit, by group."""
        return unit_scores(self.units, model, self._parameters(model), self._criterion)

    def kept(self, model: nn.Module, sparsities: Sequence[float]) -> list[dict[str, Kept]]:
        """The units that stay at each sparsity, by group."""
        shapes = {name: parameter.shape for name, parameter in self._parameters(model).items()}
        return Ranking(self.units, self.scores(model), shapes, self._rule).kept(sparsities)

    def mask(self, model: nn.Module, kept: Mapping[str, Kept]) -> Mask:
        """The mask that keeps these units."""
        shapes = {name: parameter.shape for name, parameter in self._parameters(model).items()}
        return Mask.from_packed(self.units.packed(kept, shapes), shapes, metadata=units_metadata(self.units))

    def _parameters(self, model: nn.Module) -> dict[str, torch.Tensor]:
        owned = self.units.names()
        return {name: parameter for name, parameter in model.named_parameters() if name in owned}


def _none_found(model: nn.Module, unit: str, structure: Structure) -> str:
    others = sorted({group.kind for group in structure.units.groups})
    reasons = ", ".join(f"{count} because {why}" for why, count in structure.pinned.most_common(3))
    return (
        f"{type(model).__name__} has no {unit} that can leave. "
        + (f"Its units are of the kind {' and '.join(map(repr, others))}. " if others else "")
        + (f"Indices that must stay: {reasons}. " if reasons else "")
        + "A unit is what some layer makes, only layers read, and no operation in between mixes with others."
    )
