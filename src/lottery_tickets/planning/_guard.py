"""An operation that would run out of memory is refused before it starts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lottery_tickets._batches import batches_of, size_of
from lottery_tickets.errors import BatchError, MemoryPlanError, ParameterSelectionError
from lottery_tickets.masks import Patterns
from lottery_tickets.planning._amounts import shown
from lottery_tickets.planning._bytes import Bytes
from lottery_tickets.planning._items import OPERATIONS, TRAINING
from lottery_tickets.planning._limits import FreeMemory, free_memory
from lottery_tickets.planning._options import Options
from lottery_tickets.planning._plan import plan_of
from lottery_tickets.planning._shapes import Shapes
from lottery_tickets.training import LEARNING_RATES, Recipe, SharedBatches, length_of

# A model; what is ranked without one; or sizes of what is in files.
Subject = nn.Module | Mapping[str, torch.Tensor] | Shapes

_UNCHECKED: ContextVar[bool] = ContextVar("memory is not checked", default=False)
# Where weights take less than this, nothing that is certain to be needed is worth asking for.
_SMALL = 16 << 20
# Items that are there when an operation is called, where that is not the weights.
_THERE = {"load": (), "apply": ("mask",), "quality": ("weights", "mask")}


@contextmanager
def unchecked() -> Iterator[None]:
    """Nothing is refused inside the block, as if every call said check_memory=False."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


def refuse_if_too_large(
    operation: str,
    subject: Subject,
    dataloader: Any = None,
    *,
    check: bool,
    include: Patterns = None,
    exclude: Patterns = None,
    **options: Any,
) -> None:
    """Ask for the memory of an operation on a model that is loaded, before it starts.

    What is loaded is not counted. Nothing is drawn from a dataloader: of a list the first batch is looked at, of a
    DataLoader its batch size, and of anything else only what is needed whatever the batch. Training on an
    accelerator halves batches that do not fit, so that only one sample has to. What is unknown counts for nothing.

    Args:
        operation: A name of `OPERATIONS`.
        subject: The model, what is ranked without one, or sizes of what is in files.
        dataloader: As the operation takes it; None for none.
        check: Whether to ask at all.
        include: Widens what is prunable.
        exclude: Narrows it.
        options: Further fields of `Options`.

    Raises:
        MemoryPlanError: More is needed than is free; the message has the plan.
    """
    device = _only_device(subject) if check and not _UNCHECKED.get() else None
    if device is None or _is_small(subject):
        return
    rows, length = sizes_of(dataloader)
    if operation in TRAINING and device.type != "cpu":
        rows = 1
    settled = Options(device=device.type, batch_size=rows, sequence_length=length, **options)
    try:
        shapes = _shapes_of(subject, include, exclude)
    except ParameterSelectionError:  # the operation itself says what is wrong, or does without these parameters
        return
    found = OPERATIONS[operation](shapes, settled)
    for needed, free in _needs(operation, found, device):
        if free is not None and needed > free.bytes:
            name = type(subject).__name__ if isinstance(subject, nn.Module) else "these tensors"
            limit = found.total - needed + free.bytes if device.type == "cpu" else None
            plan = plan_of(shapes, operation, settled, limit=limit, name=name, patterns=(include, exclude))
            raise MemoryPlanError(
                f"{operation} needs {shown(needed)} besides what is loaded, and {shown(free.bytes)} are free "
                f"({free.limit}). Not started; check_memory=False goes on all the same.\n{plan}"
            )


def refuse_training_if_too_large(
    operation: str,
    model: nn.Module,
    dataloader: Any,
    recipe: Recipe,
    *,
    check: bool,
    include: Patterns = None,
    exclude: Patterns = None,
    **options: Any,
) -> None:
    """The same for training by a recipe; of a function's optimizer gradients are known, and not its state.

    Raises:
        MemoryPlanError: More is needed than is free; the message has the plan.
    """
    if recipe.trainer_fn is not None:
        return
    refuse_if_too_large(
        operation,
        model,
        dataloader,
        check=check,
        include=include,
        exclude=exclude,
        optimizer=recipe.optimizer if recipe.optimizer in LEARNING_RATES else "torch sgd",
        momentum=recipe.momentum,
        precision="compensated" if recipe.precision == "compensated" else "stochastic",
        max_batch_size=recipe.max_batch_size,
        gradient_checkpointing=recipe.gradient_checkpointing is not False,
        **options,
    )


def _shapes_of(subject: Subject, include: Patterns, exclude: Patterns) -> Shapes:
    if isinstance(subject, Shapes):
        return subject
    if isinstance(subject, nn.Module):
        return Shapes.of_model(subject, include, exclude)
    return Shapes.of_tensors(subject)


def _needs(operation: str, found: Bytes, device: torch.device) -> list[tuple[int, FreeMemory | None]]:
    """Bytes that are not there yet, and what is free for them."""
    loaded = _THERE.get(operation, ("weights",))
    here = found.total - sum(found.device[item] for item in loaded)
    if device.type == "cpu":
        return [(here, free_memory("cpu"))]
    there = sum(found.host.values()) - sum(found.host[item] for item in loaded)
    return [(here, free_memory(device)), (there, free_memory("cpu"))]


def _only_device(subject: Subject) -> torch.device | None:
    """Where all of it lies; None for several devices, none, or "meta"."""
    if isinstance(subject, Shapes):
        return torch.device("cpu")
    tensors = list(subject.parameters() if isinstance(subject, nn.Module) else subject.values())
    if not all(isinstance(one, torch.Tensor) for one in tensors):  # the operation says so
        return None
    devices = {one.device for one in tensors}
    device = devices.pop() if len(devices) == 1 else None
    return None if device is None or device.type == "meta" else device


def _is_small(subject: Subject) -> bool:
    if isinstance(subject, Shapes):
        return subject.weights < _SMALL
    tensors = subject.parameters() if isinstance(subject, nn.Module) else subject.values()
    return sum(one.numel() * one.element_size() for one in tensors) < _SMALL


def sizes_of(dataloader: Any) -> tuple[int, int]:
    """Samples of a batch and tokens of a sample, 1 where that is not known without asking for a batch."""
    if isinstance(dataloader, SharedBatches):
        rows, length = sizes_of(dataloader.dataloader)
        return math.ceil(rows / dataloader.processes), length
    if isinstance(told := getattr(dataloader, "batch_size", None), int):
        return max(1, told), 1
    if not isinstance(dataloader, (list, tuple, Mapping)) or not dataloader:
        return 1, 1
    first = next(iter(batches_of(dataloader)))
    try:
        return max(1, size_of(first)), length_of(first)
    except BatchError:  # the operation says what came
        return 1, 1
