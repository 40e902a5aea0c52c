"""Which processes work on a model together."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from lottery_tickets._ranks import Ranks


def joined(model: nn.Module, process_group: dist.ProcessGroup | None) -> tuple[nn.Module, Ranks]:
    """The model as one process has it, and the ranks that have it.

    Gradients and measurements are added up by the library, in an order that gives every rank the same bits; what
    DistributedDataParallel would do in a backward pass of its own is not asked for, so it is taken off.

    Args:
        model: Any module; in DistributedDataParallel, whose process group then counts if no other is given.
        process_group: The ranks; None for this process alone.

    Raises:
        DistributedError: This process is not in the group.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        process_group = process_group or model.process_group
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    first = next(model.parameters(), None)
    return model, Ranks(process_group, None if first is None else first.device)
