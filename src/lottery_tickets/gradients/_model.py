"""A model made ready for gradients that nobody keeps, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lottery_tickets._batches import evaluating


@contextmanager
def borrowed(model: nn.Module, *, checkpoint_activations: bool) -> Iterator[None]:
    """Evaluation mode, gradients on, no parameter that requires any; all as it was afterwards.

    Modes, `requires_grad` and `.grad` of every parameter, hooks and torch's random state come back, whatever
    happens inside.
    """
    kept = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    devices = sorted({one.device.index for one, _, _ in kept if one.is_cuda})
    blocks = _blocks(model) if checkpoint_activations else []
    try:
        for parameter, _, _ in kept:
            parameter.requires_grad_(False)
            parameter.grad = None
        for block in blocks:
            # An attribute of the instance hides the method of the class until it is deleted.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        with torch.random.fork_rng(devices=devices), evaluating(model), torch.enable_grad():
            yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
        for parameter, flag, gradient in kept:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def differentiated(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters that require gradients inside the block."""
    listed = list(parameters)
    flags = [one.requires_grad for one in listed]
    try:
        for one in listed:
            one.requires_grad_(True)
        yield listed
    finally:
        for one, flag in zip(listed, flags, strict=True):
            one.requires_grad_(flag)


def _blocks(model: nn.Module) -> list[Any]:
    """The outermost members of the model's module lists: the layers of a transformer."""
    found: list[Any] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(one for one in child if "forward" not in vars(one))
            else:
                walk(child)

    walk(model)
    return list(dict.fromkeys(found))
