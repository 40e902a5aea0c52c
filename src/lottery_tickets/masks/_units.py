"""Units: the channels, heads and neurons of a model, and what each of them is made of.

A unit is what leaves a network whole: a neuron with its row in one layer and its column in the next, a channel
with its normalisation and every layer that reads it. A group holds the units of one place, all made alike. Its
parts say for every index of one dimension of one tensor which unit owns it; taken together, the parts of a unit
are all that is gone when the unit is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.errors import MaskError
from lottery_tickets.masks._bits import PackedBits

Kind = Literal["channel", "head", "neuron"]
Owners = npt.NDArray[np.int64]
Kept = npt.NDArray[np.bool_]

# The key of a mask's metadata under which its units stand.
METADATA_KEY = "structured_units"
NOBODY = -1


@dataclass(frozen=True, eq=False)
class Part:
    """What a group owns of one dimension of a tensor.

    Attributes:
        name: Of the parameter or buffer.
        dim: The dimension.
        owners: For each index, the number of the unit that owns it, or -1.
    """

    name: str
    dim: int
    owners: Owners

    def gone(self, kept: Kept) -> Kept:
        """Which indices go with the units that are not kept."""
        return np.append(~kept, False)[self.owners]


@dataclass(frozen=True, eq=False)
class UnitGroup:
    """Units of one place, all made alike.

    Attributes:
        name: The module that makes them.
        kind: "channel", "head" or "neuron".
        count: How many there are.
        parts: What they own, in the order of the model; buffers last.
    """

    name: str
    kind: Kind
    count: int
    parts: tuple[Part, ...]


@dataclass(frozen=True, eq=False)
class Units:
    """Groups of units, in the order of the model.

    Attributes:
        groups: One for each place.
    """

    groups: tuple[UnitGroup, ...]

    def of_kind(self, kind: str) -> Units:
        """The groups of one kind."""
        return Units(tuple(group for group in self.groups if group.kind == kind))

    def names(self) -> set[str]:
        """The tensors that some unit owns a part of."""
        return {part.name for group in self.groups for part in group.parts}

    def gone(self, kept: Mapping[str, Kept]) -> dict[str, dict[int, Kept]]:
        """By tensor and dimension, the indices that go with units.

        Args:
            kept: Group name to a decision for each unit, True for kept.
        """
        found: dict[str, dict[int, Kept]] = {}
        for group in self.groups:
            for part in group.parts:
                dims = found.setdefault(part.name, {})
                gone = part.gone(kept[group.name])
                dims[part.dim] = dims[part.dim] | gone if part.dim in dims else gone
        return found

    def packed(self, kept: Mapping[str, Kept], shapes: Mapping[str, torch.Size]) -> dict[str, PackedBits]:
        """Packed bits of these tensors: a weight stays where none of its indices is gone."""
        gone = self.gone(kept)
        packed: dict[str, PackedBits] = {}
        for name, shape in shapes.items():
            bits = np.ones(tuple(shape), np.bool_)
            for dim, indices in gone.get(name, {}).items():
                bits[(slice(None),) * dim + (indices,)] = False
            packed[name] = np.packbits(bits.reshape(-1), bitorder="little")
        return packed

    def kept_in(self, mask: Mapping[str, torch.Tensor]) -> dict[str, Kept]:
        """Which units a mask keeps: those of which it keeps some weight.

        Raises:
            MaskError: The mask has no tensor of some group.
        """
        found = {}
        for group in self.groups:
            part = next((part for part in group.parts if part.name in mask), None)
            if part is None:
                raise MaskError(f"{group.name}: the mask speaks of no tensor that its units are made of.")
            bits = mask[part.name].movedim(part.dim, 0).reshape(len(part.owners), -1).any(dim=1).numpy()
            owned = part.owners != NOBODY
            found[group.name] = np.bincount(part.owners[owned], bits[owned], minlength=group.count) > 0
        return found

    # ---------------------------------------------------------------- text

    def __str__(self) -> str:
        """In a few words."""
        kinds = sorted({group.kind for group in self.groups})
        counts = [group.count for group in self.groups]
        return f"{sum(counts):,} {' and '.join(f'{kind}s' for kind in kinds)} in {len(counts):,} layers"

    def to_json(self) -> str:
        """As text, owners in runs: what a ticket's file says of its units."""
        groups = [
            {
                "name": group.name,
                "kind": group.kind,
                "count": group.count,
                "parts": [[part.name, part.dim, _runs(part.owners)] for part in group.parts],
            }
            for group in self.groups
        ]
        return json.dumps(groups, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Units:
        """Read back what `to_json` wrote.

        Raises:
            MaskError: Text that it did not write.
        """
        try:
            return cls(tuple(_group(group) for group in json.loads(text)))
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise MaskError(
                f"The mask's metadata {METADATA_KEY!r} does not describe units ({error!r}); draw the mask again."
            ) from error


def _group(read: Any) -> UnitGroup:
    if read["kind"] not in ("channel", "head", "neuron"):
        raise ValueError(f"no kind of unit: {read['kind']!r}")
    parts = tuple(Part(str(name), int(dim), _owners(runs)) for name, dim, runs in read["parts"])
    count = int(read["count"])
    for part in parts:
        if part.owners.size and not NOBODY <= part.owners.min() <= part.owners.max() < count:
            raise ValueError(f"{part.name}: owned by units that there are not")
    return UnitGroup(str(read["name"]), read["kind"], count, parts)


def _runs(owners: Owners) -> list[list[int]]:
    """Owners as runs [first unit, units, indices of each]: units that follow each other with as many indices."""
    pairs = [(int(owner), len(list(same))) for owner, same in groupby(owners.tolist())]
    runs: list[list[int]] = []
    for owner, length in pairs:
        if runs and owner != NOBODY and runs[-1][2] == length and owner == runs[-1][0] + runs[-1][1] != 0:
            runs[-1][1] += 1
        else:
            runs.append([owner, 1, length])
    return runs


def _owners(runs: Iterable[Iterable[int]]) -> Owners:
    # Sizes come from untrusted text, and no tensor of a model has a dimension beyond this.
    found: list[Owners] = []
    for first, units, length in runs:
        if units < 1 or length < 1 or units * length >= 1 << 32:
            raise ValueError(f"no run of owners: {[first, units, length]}")
        one = np.full(units, NOBODY) if first == NOBODY else np.arange(first, first + units)
        found.append(np.repeat(one, length).astype(np.int64))
    return np.concatenate(found) if found else np.empty(0, np.int64)


def left_of(shape: torch.Size, dims: Mapping[int, Kept]) -> tuple[int, ...]:
    """The shape of what is left of a tensor without these indices."""
    return tuple(size - int(dims[dim].sum()) if dim in dims else size for dim, size in enumerate(shape))


def readable_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata for a reader: sorted, and units in a few words."""
    told = dict(sorted(metadata.items()))
    if METADATA_KEY in told:
        told[METADATA_KEY] = str(Units.from_json(told[METADATA_KEY]))
    return told


def units_metadata(units: Units) -> dict[str, str]:
    """What the metadata of a mask of units holds, so that `Mask.units` gives them."""
    return {METADATA_KEY: units.to_json()}
