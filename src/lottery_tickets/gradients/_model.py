"""A model made ready for gradients that nobody keeps, and given back as it was."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lottery_tickets._batches import evaluating
from lottery_tickets.errors import ScoreError
from lottery_tickets.training import blocks_of, checkpointed_blocks


@contextmanager
def borrowed(model: nn.Module, *, checkpoint_activations: bool) -> Iterator[None]:
    """Evaluation mode, gradients on, no parameter that requires any; all as it was afterwards.

    Modes, `requires_grad` and `.grad` of every parameter, hooks and torch's random state come back, whatever
    happens inside.
    """
    kept = [(one, one.requires_grad, one.grad) for one in model.parameters()]
    devices = sorted({one.device.index for one, _, _ in kept if one.is_cuda})
    blocks = blocks_of(model) if checkpoint_activations else []
    try:
        for parameter, _, _ in kept:
            parameter.requires_grad_(False)
            parameter.grad = None
        with (
            checkpointed_blocks(blocks),
            torch.random.fork_rng(devices=devices),
            evaluating(model),
            torch.enable_grad(),
        ):
            yield
    finally:
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


@contextmanager
def widened(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers of two bytes as float32 inside the block; their own memory comes back untouched."""
    narrow = [
        one
        for group in (model.parameters(), model.buffers())
        for one in group
        if one.is_floating_point() and one.element_size() < torch.float32.itemsize
    ]
    kept = [one.data for one in narrow]
    try:
        for one in narrow:
            one.data = one.data.float()
        yield
    finally:
        for one, data in zip(narrow, kept, strict=True):
            one.data = data


def refuse_folder(model: object, why: str) -> None:
    """Refuse the name of a checkpoint where the model itself has to be in memory.

    Raises:
        ScoreError: With the remedy.
    """
    if isinstance(model, (str, os.PathLike)):
        raise ScoreError(
            f"{model}: {why}. From a folder, block by block, come compute_wanda_importance, which needs forward "
            "passes only, and create_magnitude_mask, which needs none. Load the model for this one, "
            "large_models.load_model(folder)."
        )
