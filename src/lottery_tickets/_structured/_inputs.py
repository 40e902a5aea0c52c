"""Example inputs: what a model is traced with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lottery_tickets._batches import Inputs
from lottery_tickets.errors import StructureError

Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# More than one sample and one position, so that no dimension passes for one that is broadcast.
_SAMPLES, _POSITIONS = 2, 8


def arguments(model: nn.Module, example_inputs: Any = None) -> Arguments:
    """Positional and keyword arguments of a forward pass.

    Args:
        model: What is called.
        example_inputs: A tensor, a tuple or list of arguments, a mapping of keyword arguments, or None for some
            made from the model: token numbers or images by its `config`, vectors for a first linear layer.

    Raises:
        StructureError: None can be made, or they are of another form.
    """
    if example_inputs is None:
        return _made(model)
    if isinstance(example_inputs, Inputs):
        return example_inputs.args, example_inputs.kwargs | _without_cache(model)
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        told = {name: value for name, value in example_inputs.items() if name != "labels"}
        return (), told | _without_cache(model)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise StructureError(
        f"example_inputs is a tensor, a tuple of arguments or a mapping of keyword arguments, got "
        f"{type(example_inputs).__name__}."
    )


def makes_inputs(model: nn.Module) -> bool:
    """Whether inputs can be made from the model alone."""
    try:
        _made(model)
    except StructureError:
        return False
    return True


def _made(model: nn.Module) -> Arguments:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    config: Any = getattr(model, "config", None)
    if isinstance(getattr(config, "vocab_size", None), int) and not getattr(config, "is_encoder_decoder", False):
        tokens = torch.zeros(_SAMPLES, _POSITIONS, dtype=torch.int64, device=device)
        return (), {"input_ids": tokens} | _without_cache(model)
    if isinstance(getattr(config, "image_size", None), int):
        side, channels = config.image_size, getattr(config, "num_channels", 3)
        dtype = next(model.parameters()).dtype
        return (), {"pixel_values": torch.zeros(_SAMPLES, channels, side, side, dtype=dtype, device=device)}
    first = next((module for module in model.modules() if list(module.parameters(recurse=False))), None)
    if isinstance(first, nn.Linear):
        return (torch.zeros(_SAMPLES, first.in_features, dtype=first.weight.dtype, device=device),), {}
    raise StructureError(
        f"{type(model).__name__} does not tell what it takes, and it has to be traced to see which of its parts "
        "leave together. Pass example_inputs, such as a batch of its data."
    )


def _without_cache(model: nn.Module) -> dict[str, Any]:
    """A cache of keys and values is a second output, which would keep every head."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
