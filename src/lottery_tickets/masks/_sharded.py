"""A mask whose bits lie where the weights do: each rank of a job has those of its own parts."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from lottery_tickets._dtensors import is_sharded
from lottery_tickets.errors import MaskMismatchError
from lottery_tickets.masks._bits import PackedBits, count_common
from lottery_tickets.masks._mask import Mask, as_mask, digest_of, sparsity_of
from lottery_tickets.masks._parameters import parameters_of
from lottery_tickets.masks._shards import Division, Shard, assembled, reshard, shard_of


class ShardedMask(Mapping[str, torch.Tensor]):
    """A mask of a sharded model, of which every rank holds the bits of its own weights.

    What it says of itself (names, shapes, counts, sparsity, digest) is said of the whole mask and is the same on
    every rank; `mask[name]` is this rank's part of one tensor. `applied`, `held`, `apply_mask` and `remove_mask`
    take it for a model that is sharded in the same way.

    Attributes:
        names: Parameter names, in the order of the model.
        shapes: Name to the whole parameter's shape.
        local: The bits of this rank, as a mask of its parts.

    Example:
        >>> import torch
        >>> import torch.distributed as dist
        >>> from torch.distributed.fsdp import fully_shard
        >>> from lottery_tickets import create_magnitude_mask
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = fully_shard(torch.nn.Linear(4, 2, bias=False))
        >>> mask = create_magnitude_mask(model, 0.5)
        >>> mask
        ShardedMask(1 tensors, 8 weights, 4 kept, sparsity 0.5000; 8 on this rank of 1)
        >>> mask.gathered()
        Mask(1 tensors, 8 weights, 4 kept, sparsity 0.5000)
        >>> mask.digest() == mask.gathered().digest()
        True
        >>> dist.destroy_process_group()

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 1: the mask m of f(x; m * theta).
    """

    __slots__ = ("_digest", "_division", "_kept", "local")

    # What asks for whole masks tells by this that it has been given a part.
    is_part = True

    local: Mask
    _digest: str | None
    _division: Division
    _kept: dict[str, int]

    def __init__(self) -> None:
        raise TypeError("Make a ShardedMask with ShardedMask.of, or by create_magnitude_mask of a sharded model.")

    @classmethod
    def from_packed(cls, packed: Mapping[str, PackedBits], division: Division) -> ShardedMask:
        """Take over the packed bits of this rank's parts; all ranks make this call.

        Args:
            packed: Name to the bits of a part, as for `Mask.from_packed`.
            division: How the tensors are spread.

        Raises:
            MaskError: Bits that do not fit the parts, on any rank.
            DistributedError: Another rank failed.
        """
        mask = object.__new__(cls)
        with division.ranks.together():
            mask.local = Mask.from_packed(packed, division.parts)
            kept = mask.local.layer_kept()
            here = np.array([kept[name] if name in division.counted else 0 for name in kept], np.int64)
            everywhere = division.ranks.sum(here).tolist()
        mask._division = division
        mask._kept = dict(zip(kept, everywhere, strict=True))
        mask._digest = None
        return mask

    @classmethod
    def of(cls, mask: Mapping[str, torch.Tensor], model: nn.Module) -> ShardedMask:
        """This rank's part of a whole mask; all ranks make this call.

        Args:
            mask: A `Mask` or a plain dict of tensors, the same on every rank.
            model: A sharded model that it fits.

        Raises:
            MaskMismatchError: A mask that does not fit the model, or a model that is not sharded.
            DistributedError: Another rank failed, or has another model.
        """
        reshard(model)
        whole = as_mask(mask)
        parameters = parameters_of(model, whole)
        division = Division.of(parameters)
        if division is None:
            raise MaskMismatchError(
                f"{type(model).__name__} has no DTensor among the mask's parameters, so there are no parts to "
                "take; use the mask as it is."
            )
        return cls.from_packed(_parts(whole, division.shards), division)

    # ---------------------------------------------------------------- a mapping

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.local[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.local)

    def __len__(self) -> int:
        return len(self.local)

    def __repr__(self) -> str:
        return (
            f"ShardedMask({len(self)} tensors, {self.numel} weights, {self.kept} kept, "
            f"sparsity {self.sparsity:.4f}; {self.local.numel} on this rank of {self._division.ranks.size})"
        )

    # ---------------------------------------------------------------- looking at it

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in the order of the model."""
        return self.local.names

    @property
    def shapes(self) -> Mapping[str, torch.Size]:
        """Name to the whole parameter's shape."""
        return MappingProxyType(self._division.shapes)

    @property
    def shards(self) -> Mapping[str, Shard]:
        """Name to where this rank's part lies in the whole."""
        return MappingProxyType(dict(self._division.shards))

    @property
    def numel(self) -> int:
        """Number of weights the mask decides on."""
        return sum(self.layer_numel().values())

    @property
    def kept(self) -> int:
        """Number of weights kept."""
        return sum(self._kept.values())

    @property
    def sparsity(self) -> float:
        """Fraction of the weights removed; 0.0 for a mask over nothing."""
        return sparsity_of(self.kept, self.numel)

    def layer_numel(self) -> dict[str, int]:
        """Number of weights per tensor."""
        return {name: shape.numel() for name, shape in self._division.shapes.items()}

    def layer_kept(self) -> dict[str, int]:
        """Number of weights kept per tensor."""
        return dict(self._kept)

    def layer_sparsity(self) -> dict[str, float]:
        """Fraction removed per tensor; 0.0 for an empty tensor."""
        return {name: sparsity_of(self._kept[name], numel) for name, numel in self.layer_numel().items()}

    def common_kept(self, other: Mask | ShardedMask, names: Sequence[str]) -> dict[str, int]:
        """How many weights of each tensor both masks keep, counted where they lie; all ranks make this call.

        Args:
            other: A whole mask, the same on every rank, or one that is sharded in the same way.
            names: Tensors that both masks have, in equal shapes.

        Raises:
            MaskMismatchError: A mask that is sharded in another way.
            DistributedError: Another rank failed.
        """
        ranks, here = self._division.ranks, np.zeros(len(names), np.int64)
        with ranks.together():
            for number, name in enumerate(names):
                if isinstance(other, ShardedMask):
                    self._check_alike(name, other._division.shards[name])
                    theirs = other.local.packed(name)
                else:
                    theirs = self._division.shards[name].cut(other.packed(name))
                if name in self._division.counted:
                    here[number] = count_common(self.local.packed(name), theirs)
            return dict(zip(names, ranks.sum(here).tolist(), strict=True))

    # ---------------------------------------------------------------- the whole

    def digest(self) -> str:
        """The digest of the whole mask, which passes through rank 0 tensor by tensor; all ranks make this call.

        Raises:
            DistributedError: Another rank failed.
        """
        ranks = self._division.ranks
        if self._digest is None:
            with ranks.together():
                tensors = self._collected(sorted(self.names))
                found = (
                    digest_of((name, self.shapes[name], bits) for name, bits in tensors) if ranks.first else None
                )
                for _ in tensors:  # the others only give theirs
                    pass
                self._digest = str(ranks.gather(found)[0])
        return self._digest

    def gathered(self) -> Mask:
        """The whole mask on every rank: an eighth of a byte a weight; all ranks make this call.

        Raises:
            DistributedError: Another rank failed.
        """
        ranks = self._division.ranks
        with ranks.together():
            packed = {name: assembled(self.shapes[name], ranks.gather(self._part(name))) for name in self.names}
        return Mask.from_packed(packed, self._division.shapes)

    def collected(self) -> Mask | None:
        """The whole mask on rank 0, None on the others; all ranks make this call.

        Raises:
            DistributedError: Another rank failed.
        """
        ranks = self._division.ranks
        with ranks.together():
            packed = {name: bits for name, bits in self._collected(self.names) if bits is not None}
        return Mask.from_packed(packed, self._division.shapes) if ranks.first else None

    def save(self, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None) -> None:
        """Write the whole mask as `Mask.save` does: rank 0 gathers and writes it; all ranks make this call.

        Raises:
            MaskFileError: A metadata key that the format uses itself, or a value that is not text.
            DistributedError: Another rank failed.
        """
        with self._division.ranks.together():
            whole = self.collected()
            if whole is not None:
                whole.save(path, metadata)

    def _collected(self, names: Any) -> Iterator[tuple[str, PackedBits]]:
        """Tensor by tensor the whole bits, on rank 0; the others give theirs and get None."""
        for name in names:
            parts = self._division.ranks.collect(self._part(name))
            yield name, None if parts is None else assembled(self.shapes[name], parts)  # type: ignore[misc]

    def _part(self, name: str) -> tuple[Shard, PackedBits]:
        """What this rank gives to the whole: nothing of what another has a copy of that counts."""
        if name not in self._division.counted:
            return Shard(torch.Size([0]), (np.zeros(0, np.int64),)), np.zeros(0, np.uint8)
        return self._division.shards[name], self.local.packed(name)

    def check_fits(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Refuse parameters of which this rank holds other parts.

        Raises:
            MaskMismatchError: One of them is named.
        """
        for name, parameter in parameters.items():
            self._check_alike(name, shard_of(name, parameter))

    def _check_alike(self, name: str, shard: Shard) -> None:
        if not shard.is_at(self._division.shards[name]):
            raise MaskMismatchError(
                f"{name}: the mask was drawn from a model sharded in another way. mask.gathered() gives the "
                "whole mask, which fits any."
            )


def ticket_of(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> tuple[dict[str, nn.Parameter], Mask]:
    """The parameters that a mask speaks of, and its bits for what this rank holds of them.

    Fully sharded modules go back to their shards first. Nothing is told to other ranks.

    Args:
        model: The model that the mask is meant for.
        mask: Whole or sharded.

    Raises:
        MaskError: Neither a mask nor a mapping from names to tensors of 0 and 1.
        MaskMismatchError: Names or shapes that the model does not have, or a mask sharded in another way.
        WeightsError: Parameters on the meta device, or placements of a kind that is not known.
    """
    reshard(model)
    if isinstance(mask, ShardedMask):
        parameters = parameters_of(model, mask)
        mask.check_fits(parameters)
        return parameters, mask.local
    whole = as_mask(mask)
    parameters = parameters_of(model, whole)
    if not any(is_sharded(parameter) for parameter in parameters.values()):
        return parameters, whole
    shards = {name: shard_of(name, parameter) for name, parameter in parameters.items()}
    return parameters, Mask.from_packed(_parts(whole, shards), {name: one.part for name, one in shards.items()})


def _parts(whole: Mask, shards: Mapping[str, Shard]) -> dict[str, PackedBits]:
    return {name: shards[name].cut(whole.packed(name)) for name in whole.names}
