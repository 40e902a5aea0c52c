"""Which processes work on a model together, and what each of them has of it."""

from __future__ import annotations

import gc
import os
from typing import overload

import torch.distributed as dist
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError
from lottery_tickets.masks import is_sharded, reshard


@overload
def joined(
    model: nn.Module, process_group: dist.ProcessGroup | None, what: str, *, sharded: bool = False
) -> tuple[nn.Module, Ranks]: ...


@overload
def joined(
    model: nn.Module | str | os.PathLike[str],
    process_group: dist.ProcessGroup | None,
    what: str,
    *,
    sharded: bool = False,
) -> tuple[nn.Module | str | os.PathLike[str], Ranks]: ...


def joined(
    model: nn.Module | str | os.PathLike[str],
    process_group: dist.ProcessGroup | None,
    what: str,
    *,
    sharded: bool = False,
) -> tuple[nn.Module | str | os.PathLike[str], Ranks]:
    """The model as one process has it, and the ranks that have it.

    Gradients and measurements are added up by the library, in an order that gives every rank the same bits; what
    DistributedDataParallel would do in a backward pass of its own is not asked for, so it is taken off.

    Args:
        model: Any module; in DistributedDataParallel, whose process group then counts if no other is given, or in
            parts by `fully_shard`, over all ranks of the job. A checkpoint's folder is one process's.
        process_group: The ranks; None for this process alone.
        what: What is to be done, for messages.
        sharded: Whether that can be done to a model in parts.

    Raises:
        DistributedError: This process is not in the group, the model lies in parts that are not known here, or it
            is a folder beside a process group.
    """
    if not isinstance(model, nn.Module):
        if process_group is not None:
            raise DistributedError(
                f"{what} of a checkpoint's folder ({model}) is for one process, which reads it block by block; "
                "leave process_group out, or load the model."
            )
        return model, Ranks()
    if isinstance(model, nn.parallel.DistributedDataParallel):
        process_group = process_group or model.process_group
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    reshard(model)
    if lies_in_parts(model):
        _check_parts(model, process_group, what, possible=sharded)
        process_group = dist.group.WORLD
    first = next(model.parameters(), None)
    return model, Ranks(process_group, None if first is None else first.device)


def let_go(ranks: Ranks) -> None:
    """Collect what is left of a training, so that nothing refers to the process group any more.

    Optimizers and their hooks refer to each other, and so do frames of ours and errors in what torch imports when
    it makes its first optimizer. If the process ended before they are collected, gloo might abort it.
    """
    if ranks.group is not None:
        gc.collect()


def lies_in_parts(model: nn.Module) -> bool:
    """Whether some parameter is a DTensor, so that every pass through the model is one of all ranks."""
    return any(is_sharded(one) for one in model.parameters())


def _check_parts(model: nn.Module, process_group: dist.ProcessGroup | None, what: str, *, possible: bool) -> None:
    for name, one in model.named_parameters():
        if not possible and is_sharded(one):
            raise DistributedError(
                f"{what} is for models that every rank has whole, and {name} is a DTensor. Give the model before "
                "it is sharded; masks by magnitude can be drawn from it as it is."
            )
        mesh = getattr(one, "device_mesh", None)
        if mesh is None or mesh.ndim != 1 or mesh.size() != dist.get_world_size():
            where = "whole" if mesh is None else f"on a mesh of {tuple(mesh.shape)}"
            raise DistributedError(
                f"{what}: {name} is {where}, and of {dist.get_world_size()} ranks. Of models in parts those are "
                "taken whose parameters are all sharded over all ranks, as fully_shard(model) does."
            )
    if process_group is not None and dist.get_world_size(process_group) != dist.get_world_size():
        raise DistributedError(f"{what}: the model is sharded over all ranks, and process_group has some of them.")
