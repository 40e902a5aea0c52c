"""What lies in parts on the ranks told as whole tensors, and taken apart again.

State is told of the whole, so that it fits any number of ranks. In memory a whole tensor is a DTensor over what
this rank has of it. On its way to a file each is put together on rank 0 when it is its turn, and let go once it is
written; on the way back every rank copies its own part out of the mapped file. So no rank ever has more than its
part, and rank 0 one tensor beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import is_sharded, local_of, shard_of, spread_as
from lottery_tickets.runs import Written

# By a parameter's position, and by other keys what is of no parameter.
States = Mapping[Any, Any]


class _InParts:
    """A DTensor on its way to a file; see `runs.Scattered`.

    Args:
        name: What it is called.
        tensor: Sharded over all of the ranks.
        ranks: Who has parts of it.

    Raises:
        WeightsError: Placements of a kind that is not known, or partial sums.
    """

    def __init__(self, name: str, tensor: torch.Tensor, ranks: Ranks) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self._shard, self._local = shard_of(name, tensor), local_of(tensor)
        self._ranks = ranks

    def whole(self) -> torch.Tensor | None:
        """The whole tensor on rank 0, None on the others; all ranks make this call."""
        shards = self._ranks.gather(self._shard)
        # Before the others begin to send, who would wait for a rank that has no memory for it.
        whole = torch.empty(self.shape, dtype=self.dtype) if self._ranks.first else None
        brought = self._ranks.bring(self._local.contiguous(), [shard.part for shard in shards])
        for rank, part in enumerate(brought):
            assert whole is not None
            for there, here in shards[rank].pairs(whole, part):
                there.copy_(here)
        return whole


def to_be_written(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, Written]:
    """Tensors as a run's folder takes them: plain ones as they are, DTensors to be put together one at a time."""
    return {name: _InParts(name, one, ranks) if is_sharded(one) else one for name, one in tensors.items()}


def part_of(name: str, whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What this rank has of a tensor, in memory of its own.

    Args:
        name: What it is called.
        whole: A plain tensor, or a DTensor that is sharded in the same way.
        like: The DTensor that says which part.

    Raises:
        TrainingError: A DTensor that is sharded in another way.
    """
    own = torch.empty_like(local_of(like), dtype=whole.dtype, memory_format=torch.contiguous_format)
    copy_part(name, whole, like, own)
    return own


def copy_part(name: str, whole: torch.Tensor, like: torch.Tensor, own: torch.Tensor) -> None:
    """Copy what this rank has of a tensor into memory that is there; see `part_of`.

    Raises:
        TrainingError: A DTensor that is sharded in another way.
    """
    if is_sharded(whole):
        if not shard_of(name, whole).is_at(shard_of(name, like)):
            raise TrainingError(f"{name}: one tensor is cut in one way and the other in another. Cut both alike.")
        own.copy_(local_of(whole))
        return
    own.copy_(shard_of(name, like).take(whole))


def first_place(name: str, parameter: torch.Tensor) -> int:
    """Where in a tensor, row-major, what this rank has of it begins; 0 if it has nothing."""
    if not is_sharded(parameter):
        return 0
    place = 0
    for size, held in zip(parameter.shape, shard_of(name, parameter).indices, strict=True):
        place = place * size + (int(held[0]) if len(held) else 0)
    return place


def whole_states(states: States, named: Sequence[tuple[str, torch.Tensor]]) -> dict[Any, Any]:
    """States of an optimizer, told of whole tensors.

    Args:
        states: Position to the state of a parameter, or of what this rank has of it. Not copied.
        named: Name and parameter, by position.

    Raises:
        TrainingError: State of a parameter in parts that is neither a number nor of the parameter's shape.
    """
    return {
        index: _whole_state(*named[index], state) if isinstance(index, int) else state
        for index, state in states.items()
    }


def own_states(states: States, named: Sequence[tuple[str, torch.Tensor]]) -> dict[Any, Any]:
    """What this rank has of the states that `whole_states` told, in memory of its own: plain tensors."""
    return {
        index: _own_state(*named[index], state) if isinstance(index, int) else deepcopy(state)
        for index, state in states.items()
    }


def _whole_state(name: str, parameter: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    if not is_sharded(parameter):
        return dict(state)
    found = {}
    for key, value in state.items():
        if is_sharded(value) and value.shape == parameter.shape:
            found[key] = value
        elif type(value) is torch.Tensor and value.dim() and value.shape == local_of(parameter).shape:
            found[key] = spread_as(parameter, value)
        elif isinstance(value, (bool, int, float, str)) or value is None or _is_number(value):
            found[key] = value
        else:
            came = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
            raise TrainingError(
                f"{name} lies in parts on the ranks, and the optimizer's {key!r} of it is {came}: neither a "
                f"number nor of the weights' shape {tuple(parameter.shape)}, so it cannot be told of the whole. "
                "Take another optimizer, or train without run_dir and without going back to a state."
            )
    return found


def _own_state(name: str, parameter: torch.Tensor, state: Mapping[str, Any]) -> dict[str, Any]:
    if not is_sharded(parameter):
        return deepcopy(dict(state))
    return {
        key: part_of(name, value, parameter)
        if isinstance(value, torch.Tensor) and not _is_number(value)
        else deepcopy(value)
        for key, value in state.items()
    }


def _is_number(value: Any) -> bool:
    return type(value) is torch.Tensor and not value.dim()
