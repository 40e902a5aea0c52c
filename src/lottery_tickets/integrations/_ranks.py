"""Training by several processes: who looks, how the others come to know, and models that are spread over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import is_sharded

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process speaks for all."""
    return Ranks.world().first


def told_by_first(find: Callable[[], T]) -> T:
    """What the first process finds, told to all; what it raises is raised in all, so that none waits for ever."""
    ranks = Ranks.world()
    with ranks.together():
        found: T = ranks.gather(find() if ranks.first else None)[0]
    return found


def refuse_parts(model: nn.Module, *, dtensors: bool) -> None:
    """Refuse a model of which each process has a part only.

    Args:
        model: As it is trained.
        dtensors: Whether parameters that are DTensors (FSDP2, tensor parallelism) are welcome.

    Raises:
        TrainingError: It is in parts.
    """
    for name, parameter in model.named_parameters():
        # FSDP1's flat parameters, and DeepSpeed's partitions.
        if hasattr(parameter, "_is_flat_param") or hasattr(parameter, "ds_id"):
            raise TrainingError(
                f"{type(model).__name__}: {name} is a part that FSDP1 or DeepSpeed has made of other weights, of "
                "which masks know nothing. Train with DDP or FSDP2, or on one process."
            )
        if is_sharded(parameter) and not dtensors:
            raise TrainingError(
                f"{type(model).__name__} is sharded over processes ({name}), and early birds are looked for in "
                "whole weights. Train with DDP or on one process; create_magnitude_mask draws single masks of "
                "sharded models."
            )


def as_placed(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor as a parameter holds it: each process takes its own part of a DTensor."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole, so none need send it.
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device, like.dtype), mesh, placements, src_data_rank=None)
