"""What a transformers model without some units is called by its configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lottery_tickets.errors import StructureError
from lottery_tickets.masks import Kept, UnitGroup, Units

# What configurations call the number of neurons of a feed-forward layer.
_NEURONS = ("intermediate_size", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim", "hidden_dim", "n_inner")
_UNIFORM = (
    "Draw the mask with allocation='uniform' and a sparsity that lets every layer lose as many, exclude= what has "
    "no number of its own, or pass loadable=False for a model that computes but cannot be loaded again by "
    "from_pretrained."
)


def configured(model: nn.Module, smaller: nn.Module, units: Units, kept: Mapping[str, Kept]) -> None:
    """Let a smaller transformers model say in its configuration what it is.

    Raises:
        StructureError: The configuration has no words for it.
    """
    before: Any = model
    config = copy.deepcopy(before.config)
    for group in units.groups:
        _tell_config(config, before.config, group, int(kept[group.name].sum()))
    built = _built(type(model), config)
    shapes = {name: tuple(tensor.shape) for name, tensor in built.state_dict().items()}
    wrong = [
        f"{name} {tuple(tensor.shape)} against {shapes.get(name)}"
        for name, tensor in smaller.state_dict().items()
        if shapes.get(name) != tuple(tensor.shape)
    ]
    if wrong:
        counts = sorted({int(kept[group.name].sum()) for group in units.groups})
        raise StructureError(
            f"The configuration of {type(model).__name__} cannot say this shape: layers keep {_listed(counts)} "
            f"{units.groups[0].kind}s, and by the nearest configuration {'; '.join(wrong[:2])}. {_UNIFORM}"
        )
    _adopt(smaller, built, before.config, config)


def _listed(counts: list[int]) -> str:
    return str(counts[0]) if len(counts) == 1 else f"between {counts[0]} and {counts[-1]}"


def _tell_config(config: Any, before: Any, group: UnitGroup, count: int) -> None:
    if group.kind == "head":
        heads = before.num_attention_heads
        head_size = getattr(before, "head_dim", None) or before.hidden_size // heads
        if hasattr(before, "num_key_value_heads") and before.num_key_value_heads is not None:
            config.num_key_value_heads = before.num_key_value_heads * count // group.count
        config.num_attention_heads = heads * count // group.count
        if hasattr(before, "head_dim"):
            config.head_dim = head_size
    for key in _NEURONS:
        if group.kind == "neuron" and getattr(before, key, None) == group.count:
            setattr(config, key, count)


def _built(kind: Any, config: Any) -> nn.Module:
    """A model of this configuration without weights, made as one is that is loaded: with its own checks."""
    try:
        with torch.device("meta"):
            built: nn.Module = kind(type(config).from_dict(config.to_dict()))
    except Exception as error:
        # Configurations check themselves and raise classes of their own.
        told = " ".join(str(error).split())
        raise StructureError(
            f"transformers has no {kind.__name__} of this shape: {told} Remove more or fewer units, or pass "
            "loadable=False for a model that computes but cannot be loaded again by from_pretrained."
        ) from error
    return built


def _adopt(smaller: nn.Module, built: nn.Module, before: Any, config: Any) -> None:
    """Give the copy the new configuration, and its modules the numbers that one built from it has."""
    modules = dict(built.named_modules())
    for name, module in smaller.named_modules():
        for key, value in _plain(modules[name]):
            if key in vars(module):
                setattr(module, key, value)
    old: Any = smaller.config
    for key, value in config.to_dict().items():
        if getattr(before, key, None) != value:
            setattr(old, key, value)


def _plain(module: nn.Module) -> Iterator[tuple[str, int]]:
    for key, value in vars(module).items():
        if type(value) is int and not key.startswith("_"):
            yield key, value
