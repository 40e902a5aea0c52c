"""Training by several processes: who looks, how the others come to know, and models that are spread over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import is_sharded

T = TypeVar("T")

Tensors = dict[str, torch.Tensor]
Saved = tuple[Mapping[str, Any], Tensors, list[dict[str, Any]]]


def is_first() -> bool:
    """Whether this process speaks for all."""
    return Ranks.world().first


def told_by_first(find: Callable[[], T]) -> T:
    """What the first process finds, told to all; what it raises is raised in all, so that none waits for ever."""
    ranks = Ranks.world()
    with ranks.together():
        found: T = ranks.gather(find() if ranks.first else None)[0]
    return found


def handed_out_by_first(find: Callable[[], Saved | None]) -> Saved | None:
    """A state that the first process finds, on all; its tensors go one after the other, as they may be large."""
    ranks = Ranks.world()
    with ranks.together():
        found = find() if ranks.first else None
        told = ranks.gather(None if found is None else (found[0], found[2], _kinds(found[1])))[0]
        if told is None:
            return None
        values, lines, kinds = told
        if found is None:
            tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in kinds.items()}
        else:
            tensors = found[1]
        for tensor in tensors.values():
            ranks.hand_out(tensor)
    return values, tensors, lines


def _kinds(tensors: Tensors) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def refuse_parts(model: nn.Module) -> None:
    """Refuse a model of which each process has a part that does not say which weights it is of.

    Raises:
        TrainingError: FSDP1 or DeepSpeed has made it.
    """
    for name, parameter in model.named_parameters():
        # FSDP1's flat parameters, and DeepSpeed's partitions.
        if hasattr(parameter, "_is_flat_param") or hasattr(parameter, "ds_id"):
            raise TrainingError(
                f"{type(model).__name__}: {name} is a part that FSDP1 or DeepSpeed has made of other weights, of "
                "which masks know nothing. Train with DDP or FSDP2, or on one process."
            )


def as_placed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as a parameter holds it: each process takes its own part of a DTensor."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole, so none need send it.
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device, like.dtype), mesh, placements, src_data_rank=None)
