"""The network without the units that a mask removes."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from lottery_tickets.errors import MaskMismatchError, StructureError
from lottery_tickets.masks import Kept, Mask, Units, as_mask, is_transposed_linear, parameters_of

Gone = Mapping[str, Mapping[int, Kept]]


def units_removed(mask: Mapping[str, torch.Tensor]) -> tuple[Units, dict[str, Kept]]:
    """The units of a mask, and which of them it keeps.

    Raises:
        StructureError: A mask of single weights, one that cuts through units, or one that keeps none of a group.
    """
    mask = as_mask(mask)
    units = mask.units
    if units is None:
        raise StructureError(
            "The mask removes single weights, and no smaller network computes the same without them. Draw it by "
            "create_structured_mask."
        )
    kept = units.kept_in(mask)
    _check_whole(mask, units, kept)
    emptied = [name for name, found in kept.items() if not found.any()]
    if emptied:
        raise StructureError(f"The mask removes every unit of {', '.join(emptied)}, which cuts the network.")
    return units, kept


def without(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> nn.Module:
    """A copy of a model in which the tensors of the removed units are smaller; see `extract_subnetwork`.

    Only what is left is copied.

    Raises:
        StructureError: See `units_removed`; or the model's tensors are not those that the mask was drawn from.
        MaskMismatchError: The mask does not fit the model.
    """
    units, kept = units_removed(mask)
    parameters = parameters_of(model, mask)
    gone = units.gone(kept)
    tensors: dict[str, torch.Tensor] = dict(parameters)
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in gone}
    _check_sizes(model, tensors, gone)
    smaller: dict[int, Any] = {}
    for name, dims in gone.items():
        if any(indices.any() for indices in dims.values()):
            smaller[id(tensors[name])] = _smaller(tensors[name], dims)
    # Whatever refers to a tensor, under whatever name, is given the smaller one in its place.
    copied = copy.deepcopy(model, smaller)
    _tell_layers(model, copied)
    return copied


def embedded(tensor: torch.Tensor, small: torch.Tensor, dims: Mapping[int, Kept]) -> None:
    """Write a smaller tensor where what is left of a large one was, and zeros elsewhere."""
    value = small.detach()
    for dim, gone in dims.items():
        larger = value.new_zeros((*value.shape[:dim], tensor.shape[dim], *value.shape[dim + 1 :]))
        value = larger.index_copy_(dim, torch.from_numpy(np.flatnonzero(~gone)).to(value.device), value)
    with torch.no_grad():
        tensor.copy_(value)


def _smaller(tensor: torch.Tensor, dims: Mapping[int, Kept]) -> torch.Tensor:
    left = tensor.detach()
    for dim, indices in dims.items():
        left = left.index_select(dim, torch.from_numpy(np.flatnonzero(~indices)).to(left.device))
    # A copy even where nothing was selected: the large tensor must not live on in a view.
    left = left.clone() if left.data_ptr() == tensor.data_ptr() else left
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(left, requires_grad=tensor.requires_grad)
    return left


def _check_whole(mask: Mask, units: Units, kept: Mapping[str, Kept]) -> None:
    for name, bits in units.packed(kept, mask.shapes).items():
        if not np.array_equal(bits, mask.packed(name)):
            raise StructureError(
                f"{name}: the mask removes other weights than those of whole units, so no smaller network "
                "computes the same. Use the mask as create_structured_mask drew it."
            )


def _check_sizes(model: nn.Module, tensors: Mapping[str, torch.Tensor], gone: Gone) -> None:
    for name, dims in gone.items():
        if name not in tensors:
            raise MaskMismatchError(
                f"The mask was drawn from a model with {name}, and {type(model).__name__} has no such tensor."
            )
        for dim, indices in dims.items():
            shape = tuple(tensors[name].shape)
            if dim >= len(shape) or shape[dim] != len(indices):
                raise MaskMismatchError(
                    f"{name}: the mask's units count {len(indices)} indices of dimension {dim}, the model's "
                    f"tensor is {shape}. Load the model that the mask was drawn from."
                )


# ---------------------------------------------------------------- what layers know of their own sizes


def _tell_layers(model: nn.Module, smaller: nn.Module) -> None:
    """Let layers that name their sizes name the new ones."""
    olds = dict(model.named_modules(remove_duplicate=False))
    for name, module in smaller.named_modules(remove_duplicate=False):
        weight = getattr(module, "weight", None)
        before = getattr(olds[name], "weight", None)
        if isinstance(weight, torch.Tensor) and isinstance(before, torch.Tensor):
            _tell_layer(module, weight.shape, before.shape)


def _tell_layer(module: Any, now: torch.Size, before: torch.Size) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = now
    elif isinstance(module, nn.modules.conv._ConvTransposeNd):
        module.in_channels, module.out_channels = now[0], now[1] * module.groups
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and before[1] == 1:  # depthwise: groups leave whole
            module.groups = now[0] * module.groups // before[0]
        module.out_channels, module.in_channels = now[0], now[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = now[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = now[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = now
    elif is_transposed_linear(module):
        module.nx, module.nf = now
