"""The part of a tensor that one rank holds: which weights of the whole it is made of.

A part holds, of each dimension, some of the indices in ascending order, and of the tensor every combination of
them. So weights lie in a part in the order in which they lie in the whole, and what comes before a place in the
whole is a beginning of the part.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lottery_tickets._dtensors import is_sharded, local_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError, WeightsError
from lottery_tickets.masks._bits import PackedBits, packed_size

Indices = npt.NDArray[np.int64]

# Decisions that are unpacked at a time, a byte each.
_UNPACKED = 1 << 22


@dataclass(frozen=True)
class Shard:
    """Where a part of a tensor lies in the whole.

    Attributes:
        shape: Of the whole tensor.
        indices: For each dimension, which indices the part has, ascending.
    """

    shape: torch.Size
    indices: tuple[Indices, ...]

    @classmethod
    def whole(cls, shape: torch.Size) -> Shard:
        """All of a tensor."""
        return cls(torch.Size(shape), tuple(np.arange(size) for size in shape))

    @property
    def part(self) -> torch.Size:
        """Shape of the part."""
        return torch.Size(len(held) for held in self.indices)

    def is_at(self, other: Shard) -> bool:
        """Whether another part holds the same weights."""
        pairs = zip(self.indices, other.indices, strict=False)
        return self.shape == other.shape and all(np.array_equal(one, two) for one, two in pairs)

    def __reduce__(self) -> tuple[Callable[..., Shard], tuple[Any, ...]]:
        """Told to other ranks as runs of indices, which there are few of."""
        return _from_runs, (tuple(self.shape), [runs_of(held) for held in self.indices])

    def before(self, position: int) -> int:
        """How many weights of the part lie before a place in the whole, both counted row-major."""
        if not self.shape:
            return position
        count, rest, inner = 0, position, self.part.numel()
        for dim, held in enumerate(self.indices):
            index, rest = divmod(rest, math.prod(self.shape[dim + 1 :]) or 1)
            inner = inner // len(held) if len(held) else 0
            place = int(np.searchsorted(held, index))
            count += place * inner
            if place == len(held) or held[place] != index:
                break
        return count

    def cut(self, packed: PackedBits) -> PackedBits:
        """The part's bits, of those of the whole tensor."""
        part = np.zeros(packed_size(self.part.numel()), np.uint8)
        rows, *columns = self._of_a_matrix()
        across, length = self._row_lengths()
        for first, last in _row_blocks(len(rows), across):
            taken = [_unpacked(packed, start * across, stop * across) for start, stop in runs_of(rows[first:last])]
            block = np.concatenate(taken).reshape(last - first, *self.shape[1:])
            for dim, held in enumerate(columns, 1):
                if len(held) < block.shape[dim]:
                    block = block.take(held, axis=dim)
            _store(part, first * length, block)
        return part

    def pairs(self, whole: torch.Tensor, part: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The same weights in the whole tensor and in the part: views of both, a pair for each run of indices."""
        for runs in product(*(_placed(held) for held in self.indices)):
            there, here = whole, part
            for dim, (start, stop, place) in enumerate(runs):
                there = there.narrow(dim, start, stop - start)
                here = here.narrow(dim, place, stop - start)
            yield there, here

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part of a whole tensor, or of one that broadcasts to it; a view where its indices are one run."""
        for dim, held in enumerate(self.indices):
            if len(held) == self.shape[dim] or tensor.shape[dim] != self.shape[dim]:
                continue
            runs = runs_of(held)
            if len(runs) <= 1:
                start, stop = runs[0] if runs else (0, 0)
                tensor = tensor.narrow(dim, start, stop - start)
            else:
                tensor = tensor.index_select(dim, torch.from_numpy(held).to(tensor.device))
        return tensor

    def _of_a_matrix(self) -> tuple[Indices, ...]:
        """The indices; a number counts as a row of one."""
        return self.indices or (np.zeros(1, np.int64),)

    def _row_lengths(self) -> tuple[int, int]:
        """Weights behind one index of the first dimension, in the whole and in the part."""
        return math.prod(self.shape[1:]), math.prod(self.part[1:])


@dataclass(frozen=True)
class Division:
    """Tensors that the ranks of a job hold in parts.

    Attributes:
        ranks: All of them.
        shards: Name to the part that this rank holds.
        counted: Names of those whose part is counted here; of copies one is, somewhere.
    """

    ranks: Ranks
    shards: Mapping[str, Shard]
    counted: frozenset[str]

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor]) -> Division | None:
        """How these tensors are spread over the ranks; None if no DTensor is among them.

        Plain tensors among DTensors are taken for copies of each other. All ranks of the job make this call.

        Raises:
            WeightsError: Placements of a kind that is not known.
            DistributedError: The ranks speak of different tensors.
        """
        sharded = [tensor for tensor in tensors.values() if is_sharded(tensor)]
        if not sharded:
            return None
        ranks = Ranks.world(sharded[0].device.type)
        with ranks.together():
            shards = {name: shard_of(name, tensor) for name, tensor in tensors.items()}
            _check_alike(ranks, tensors)
            holders = [_holders(tensor) for tensor in tensors.values()]
            # Of several meshes with a whole copy each, the one with the lowest rank counts.
            least = ranks.least(np.array([first for first, _ in holders], np.int64)).tolist()
            counted = frozenset(
                name
                for name, (first, counts), lowest in zip(tensors, holders, least, strict=True)
                if counts and first == lowest
            )
        return cls(ranks, shards, counted)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name to the shape of the whole tensor."""
        return {name: shard.shape for name, shard in self.shards.items()}

    @property
    def parts(self) -> dict[str, torch.Size]:
        """Name to the shape of this rank's part."""
        return {name: shard.part for name, shard in self.shards.items()}


def assembled(shape: torch.Size, parts: Iterable[tuple[Shard, PackedBits]]) -> PackedBits:
    """The bits of a tensor from those of its parts, block by block."""
    whole = np.zeros(packed_size(shape.numel()), np.uint8)
    across = math.prod(shape[1:])
    held = [(shard, bits) for shard, bits in parts if bits.size]
    for first, last in _row_blocks(shape[0] if shape else 1, across):
        block = np.zeros((last - first, *shape[1:]), np.bool_)
        for shard, bits in held:
            rows, *columns = shard._of_a_matrix()
            start, stop = np.searchsorted(rows, [first, last]).tolist()
            if start < stop:
                length = shard._row_lengths()[1]
                here = _unpacked(bits, start * length, stop * length).reshape(-1, *shard.part[1:])
                block[np.ix_(rows[start:stop] - first, *columns)] = here
        _store(whole, first * across, block)
    return whole


# --- DTensors ---


def spread_as(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Numbers of this rank's part of a parameter, as a DTensor that lies as it does if it is one."""
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    whole: Any = parameter
    made = DTensor.from_local(
        *(part, whole.device_mesh, whole.placements),
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )
    # Numbers that lie elsewhere than the mesh's devices have been carried there.
    return made if made.device == part.device else made.to(part.device)


def together(tensors: Iterable[object]) -> AbstractContextManager[None]:
    """A block in which an error on one rank is one on all, if some of these lie in parts on ranks."""
    sharded: Any = next((tensor for tensor in tensors if is_sharded(tensor)), None)
    return nullcontext() if sharded is None else Ranks.world(sharded.device.type).together()


def shard_of(name: str, tensor: torch.Tensor) -> Shard:
    """Where what this rank holds of a tensor lies in it.

    Raises:
        WeightsError: Placements of a kind that is not known, or partial sums.
    """
    if not is_sharded(tensor):
        return Shard.whole(tensor.shape)
    distributed: Any = tensor
    mesh, placements = distributed.device_mesh, distributed.placements
    at = mesh.get_coordinate()
    if at is None:
        raise WeightsError(f"{name}: this rank is not in the mesh that holds it; call on the mesh's ranks only.")
    indices = tuple(
        _held_indices(
            size, [(turn, one) for turn, one in enumerate(placements) if _shards(one, dim)], mesh.shape, at
        )
        for dim, size in enumerate(tensor.shape)
    )
    shard = Shard(tensor.shape, indices)
    if any(one.is_partial() for one in placements) or shard.part != local_of(tensor).shape:
        raise WeightsError(
            f"{name}: placements {placements} on a mesh of {tuple(mesh.shape)} do not say which weights this rank "
            f"holds; expected Shard and Replicate, by fully_shard, parallelize_module or distribute_tensor."
        )
    return shard


def _holders(tensor: torch.Tensor) -> tuple[int, bool]:
    """The lowest of the ranks that hold a tensor together, and whether this one is the first with its part."""
    if not is_sharded(tensor):
        return torch.distributed.get_rank(), True
    distributed: Any = tensor
    mesh = distributed.device_mesh
    copies = [
        at for at, one in zip(mesh.get_coordinate(), distributed.placements, strict=True) if one.is_replicate()
    ]
    return int(mesh.mesh.min()), not any(copies)


def _check_alike(ranks: Ranks, tensors: Mapping[str, torch.Tensor]) -> None:
    described = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors.items()]
    digests = ranks.gather(hashlib.sha256(json.dumps(described).encode()).hexdigest())
    if len(set(digests)) == 1:
        return
    other = next(rank for rank, digest in enumerate(digests) if digest != digests[0])
    texts = ranks.gather(described if ranks.rank in (0, other) else [])
    differing = [pair for pair in zip_longest(texts[0], texts[other]) if pair[0] != pair[1]]
    raise DistributedError(
        f"The ranks speak of different tensors: the first that differs is {differing[0][0]} on rank 0 and "
        f"{differing[0][1]} on rank {other}. All give the same names, shapes and types in the same order."
    )


def reshard(model: nn.Module) -> None:
    """Let fully sharded modules go back to their shards, if a forward pass has left them whole.

    Raises:
        WeightsError: Modules of the older FSDP, whose parameters do not say which weights they are.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None:
        return
    for name, one in model.named_modules():
        if isinstance(one, module.FullyShardedDataParallel):
            raise WeightsError(
                f"{name or type(model).__name__} is a FullyShardedDataParallel, which keeps flat pieces of "
                "weights under other names; shard it by torch.distributed.fsdp.fully_shard."
            )
        if isinstance(one, module.FSDPModule):
            one.reshard()


def unsharded_class(model: nn.Module) -> type:
    """The model's class, where `fully_shard` has put one of its own before it that one."""
    module = sys.modules.get("torch.distributed.fsdp")
    classes = type(model).__mro__
    if module is None or module.FSDPModule not in classes:
        return type(model)
    found: type = classes[classes.index(module.FSDPModule) + 1]
    return found


def _shards(placement: Any, dim: int) -> bool:
    """Whether a placement spreads this dimension; a strided one is no subclass of the plain one everywhere."""
    return getattr(placement, "dim", None) == dim and not placement.is_replicate()


def _held_indices(size: int, placements: list[tuple[int, Any]], mesh: Sequence[int], at: Sequence[int]) -> Indices:
    """Indices of one dimension that the mesh's place `at` holds, its placements applied from left to right.

    FSDP shards what tensor parallelism has sharded already, and calls it strided: its turn is after that of the
    placements to its right whose pieces its factor counts.
    """
    ordered: list[tuple[int, Any, int]] = []
    for turn, placement in reversed(placements):
        factor = int(getattr(placement, "split_factor", 1))
        right = math.prod(mesh[later] for later, _, _ in ordered)
        if factor == right and factor > 1:
            ordered.append((turn, placement, 1))
        else:
            ordered.insert(0, (turn, placement, factor))
    held = np.arange(size)
    for turn, _, factor in ordered:
        pieces = [_chunk(piece, mesh[turn], at[turn]) for piece in _chunks(held, factor)]
        held = np.concatenate(pieces)
    return held


def _chunks(indices: Indices, number: int) -> list[Indices]:
    return [_chunk(indices, number, place) for place in range(number)]


def _chunk(indices: Indices, number: int, place: int) -> Indices:
    """What `torch.chunk` gives, and nothing where it gives fewer pieces."""
    size = -(-len(indices) // number)
    return indices[place * size : (place + 1) * size]


# --- Bits ---


def _from_runs(shape: Sequence[int], runs: Sequence[Sequence[tuple[int, int]]]) -> Shard:
    nothing = np.zeros(0, np.int64)
    indices = [np.concatenate([nothing, *[np.arange(*run) for run in held]]) for held in runs]
    return Shard(torch.Size(shape), tuple(indices))


def _row_blocks(rows: int, length: int) -> list[tuple[int, int]]:
    """Runs of rows, each beginning at a whole byte of bits whatever a row's length."""
    step = max(1, _UNPACKED // (8 * max(length, 1))) * 8
    return [(first, min(first + step, rows)) for first in range(0, rows, step)]


def runs_of(indices: Indices) -> list[tuple[int, int]]:
    """Ascending indices as runs [start, stop)."""
    if not len(indices):
        return []
    ends = np.flatnonzero(np.diff(indices) != 1)
    starts = indices[np.append(0, ends + 1)]
    stops = indices[np.append(ends, len(indices) - 1)] + 1
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _placed(held: Indices) -> list[tuple[int, int, int]]:
    """Runs of a part's indices, and the place in the part at which each begins."""
    runs = runs_of(held)
    return [(start, stop, int(np.searchsorted(held, start))) for start, stop in runs]


def _unpacked(packed: PackedBits, start: int, stop: int) -> npt.NDArray[np.bool_]:
    first = start // 8
    bits = np.unpackbits(packed[first : packed_size(stop)], count=stop - 8 * first, bitorder="little")
    return bits[start - 8 * first :].view(np.bool_)


def _store(packed: PackedBits, start: int, decisions: npt.NDArray[np.bool_]) -> None:
    """Pack into place; `start` is a multiple of 8."""
    bits = np.packbits(np.ascontiguousarray(decisions).reshape(-1), bitorder="little")
    packed[start // 8 : start // 8 + bits.size] = bits
