"""From connected indices to groups of units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt

from lottery_tickets._structured._indices import Indices, Nodes
from lottery_tickets.masks import Kind, Part, UnitGroup, Units

_Flags = npt.NDArray[np.bool_]


class Place(NamedTuple):
    """A dimension of a parameter or buffer, with a node for each index."""

    name: str
    dim: int
    nodes: Nodes


@dataclass(frozen=True)
class Structure:
    """The units of a model, and why others are none.

    Attributes:
        units: Of every kind, in the order of the model.
        pinned: Why things that layers make cannot leave, and how many of them for each reason.
    """

    units: Units
    pinned: Counter[str]


def structure_of(indices: Indices, places: Sequence[Place]) -> Structure:
    """What the connected indices amount to: units are the components that a layer makes and nothing pins."""
    component = indices.components()
    count = int(component.max(initial=-1)) + 1
    made = {
        kind: _flagged(count, [component[nodes] for nodes, its in indices.made if its == kind])
        for kind in ("channel", "head", "neuron")
    }
    any_made = made["channel"] | made["head"] | made["neuron"]
    pinned = _flagged(count, [component[nodes] for nodes, _ in indices.pinned])
    kinds = np.select([made["head"], made["channel"]], ["head", "channel"], "neuron").tolist()
    makers = _flagged(indices.size, [nodes for nodes, _ in indices.made])
    groups = [
        _group(cast(Kind, kinds[members[0]]), members, places, component, makers)
        for members in _alike(places, component, any_made & ~pinned)
    ]
    return Structure(Units(tuple(_with_own_names(groups))), _reasons(indices, component, any_made))


def _flagged(size: int, marked: Sequence[Nodes]) -> _Flags:
    flags = np.zeros(size, np.bool_)
    for numbers in marked:
        flags[numbers] = True
    return flags


def _alike(places: Sequence[Place], component: Nodes, able: _Flags) -> list[list[int]]:
    """Components that own as much of the same dimensions, each by its first index in the first of them."""
    owned: dict[int, list[tuple[int, int]]] = {}
    for number, place in enumerate(places):
        found, firsts, counts = np.unique(component[place.nodes], return_index=True, return_counts=True)
        for which in np.argsort(firsts).tolist():
            if able[found[which]]:
                owned.setdefault(int(found[which]), []).append((number, int(counts[which])))
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for one, parts in owned.items():
        alike.setdefault(tuple(parts), []).append(one)
    return [alike[parts] for parts in sorted(alike, key=lambda parts: parts[0])]


def _group(
    kind: Kind, members: Sequence[int], places: Sequence[Place], component: Nodes, makers: _Flags
) -> UnitGroup:
    unit = np.full(int(component.max(initial=-1)) + 1, -1, np.int64)
    unit[members] = np.arange(len(members))
    parts = [(place, unit[component[place.nodes]]) for place in places]
    parts = [(place, owners) for place, owners in parts if (owners >= 0).any()]
    # Named for the first tensor whose indices a layer makes; what comes before it only reads them.
    name = next(place.name for place, owners in parts if makers[place.nodes[owners >= 0]].any())
    return UnitGroup(
        name=name.rpartition(".")[0] or name,
        kind=kind,
        count=len(members),
        parts=tuple(Part(place.name, place.dim, owners) for place, owners in parts),
    )


def _with_own_names(groups: Sequence[UnitGroup]) -> list[UnitGroup]:
    """Names told apart where one module makes several groups."""
    seen: Counter[str] = Counter()
    found = []
    for group in groups:
        seen[group.name] += 1
        number = seen[group.name]
        name = group.name if number == 1 else f"{group.name}#{number}"
        found.append(UnitGroup(name, group.kind, group.count, group.parts))
    return found


def _reasons(indices: Indices, component: Nodes, any_made: _Flags) -> Counter[str]:
    """Reasons of what pins a component first, and how many components each pins."""
    reasons: Counter[str] = Counter()
    open_ones = any_made.copy()
    for nodes, reason in indices.pinned:
        numbers = np.unique(component[nodes])
        reasons[reason] += int(open_ones[numbers].sum())
        open_ones[numbers] = False
    return +reasons
