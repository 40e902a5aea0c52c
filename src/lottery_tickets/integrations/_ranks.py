"""Training by several processes: who looks, and how the others come to know."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from lottery_tickets.errors import LotteryTicketError, TrainingError

T = TypeVar("T")


def is_first() -> bool:
    """Whether this process speaks for all."""
    return not _several() or dist.get_rank() == 0


def told_by_first(find: Callable[[], T]) -> T:
    """What the first process finds, told to all; what it raises is raised in all, so that none waits for ever."""
    if not _several():
        return find()
    told: list[Any] = [None, None]
    failure: LotteryTicketError | None = None
    if is_first():
        try:
            told[0] = find()
        except LotteryTicketError as error:
            told[1], failure = str(error), error
    dist.broadcast_object_list(told, src=0)
    if failure is not None:
        raise failure
    if told[1] is not None:
        raise TrainingError(f"The first process: {told[1]}")
    found: T = told[0]
    return found


def refuse_shards(model: nn.Module) -> None:
    """Refuse a model of which each process has a part only.

    Raises:
        TrainingError: It is sharded.
    """
    for name, parameter in model.named_parameters():
        # FSDP2 and tensor parallelism; FSDP1's flat parameters; DeepSpeed's partitions.
        if isinstance(parameter, DTensor) or hasattr(parameter, "_is_flat_param") or hasattr(parameter, "ds_id"):
            raise TrainingError(
                f"{type(model).__name__} is sharded over processes ({name}), and callbacks look at whole weights. "
                "Train with DDP, or on one process."
            )


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
