"""What a pruned model is: whether its zeros are where the mask says, how sparse and how large it is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TypedDict

import numpy as np
import torch
from torch import nn

from lottery_tickets.errors import MaskError, ParameterSelectionError
from lottery_tickets.large_models import map_parameters, resolve_model
from lottery_tickets.masks import (
    Division,
    Mask,
    PackedBits,
    as_mask,
    local_of,
    packed_size,
    parameter_aliases,
    prunable_parameters,
    reshard,
    unpack_range,
)

# Weights looked at together; a multiple of eight, since masks are cut at whole bytes.
_BLOCK = 1 << 22


class TensorCheck(TypedDict):
    """One tensor of a mask, against the model.

    Attributes:
        pruned: Weights that the mask removes.
        not_zero: Those of them that are not zero (NaN is not zero, -0.0 is).
        nan: NaN among all weights of the tensor, kept or pruned.
        problems: What is wrong, in words; empty if nothing is.
    """

    pruned: int
    not_zero: int
    nan: int
    problems: list[str]


class PruningValidation(TypedDict):
    """What `validate_pruning_correctness` returns.

    Attributes:
        valid: Every pruned weight is zero, every tensor is there in its shape, and none holds NaN.
        tensors: Parameter name to its check, for every tensor of the mask.
        problems: All problems, each after the name of its tensor.
    """

    valid: bool
    tensors: dict[str, TensorCheck]
    problems: list[str]


class ModelSize(TypedDict):
    """What `get_model_size` returns; tied parameters count once.

    Attributes:
        parameters: Number of parameters.
        trainable_parameters: Those that require gradients.
        prunable_parameters: Those that the library prunes by default; 0 if there are none, or if some are hidden
            by a parametrization.
        buffers: Number of elements of the buffers.
        bytes: Memory of parameters and buffers.
        bytes_by_dtype: The same by data type, such as "bfloat16".
        mask_bytes: Packed bits of a mask over the prunable parameters.
    """

    parameters: int
    trainable_parameters: int
    prunable_parameters: int
    buffers: int
    bytes: int
    bytes_by_dtype: dict[str, int]
    mask_bytes: int


def validate_pruning_correctness(
    model: nn.Module | str | os.PathLike[str], mask: Mapping[str, torch.Tensor]
) -> PruningValidation:
    """Whether a model is pruned as its mask says, tensor by tensor.

    What does not fit is reported, not raised. Works through each tensor block by block.

    Args:
        model: A model whose pruned weights should be zero, such as after `apply_mask`; or the folder of a
            checkpoint or its hub id, read from disk without loading the model. Of a model whose parameters are
            DTensors each rank counts its own part, all ranks make the call, and all are told of the whole.
        mask: A `Mask` or a plain dict of tensors.

    Returns:
        A `PruningValidation`.

    Raises:
        MaskError: Mask contents that are not one bit per weight.
        CheckpointError: A checkpoint that `resolve_model` refuses.
        WeightsError: Modules of the older FSDP, whose parameters do not say which weights they are.

    Example:
        >>> import torch
        >>> from lottery_tickets import apply_mask, validate_pruning_correctness
        >>> layer = torch.nn.Linear(2, 1)
        >>> mask = {"weight": torch.tensor([[True, False]])}
        >>> validate_pruning_correctness(layer, mask)["problems"]
        ['weight: 1 of 1 pruned weights are not zero']
        >>> apply_mask(layer, mask)
        >>> validate_pruning_correctness(layer, mask)["valid"]
        True
    """
    ticket = as_mask(mask)
    if isinstance(model, nn.Module):
        reshard(model)
        tensors = _checks(dict(model.named_parameters(remove_duplicate=False)), ticket)
    else:
        with map_parameters(resolve_model(model), ticket) as stored:
            tensors = _checks(stored, ticket)
    problems = [f"{name}: {problem}" for name, check in tensors.items() for problem in check["problems"]]
    return PruningValidation(valid=not problems, tensors=tensors, problems=problems)


def compute_sparsity(subject: Mapping[str, torch.Tensor] | torch.Tensor | nn.Module) -> float:
    """Fraction removed by a mask, or fraction of zeros of a tensor or a model.

    Args:
        subject: A `Mask` or a plain dict of masks: the fraction of weights it removes. A tensor: the fraction of
            its elements that are zero (or False). A model: the fraction of zeros among its prunable weights (see
            `prunable_parameters`), as they are stored: a mask that is only `applied` does not show.

    Returns:
        A fraction in [0, 1]; 0.0 for what has no elements.

    Raises:
        MaskError: Neither of these, or a dict whose tensors are not masks.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_sparsity
        >>> compute_sparsity(torch.tensor([0.0, -0.0, 1.0, 2.0]))
        0.5
        >>> compute_sparsity({"w": torch.tensor([True, True, True, False])})
        0.25
        >>> compute_sparsity(torch.nn.Linear(4, 4))
        0.0
    """
    if isinstance(subject, nn.Module):
        return _share_of_zeros(*prunable_parameters(subject).values())
    if isinstance(subject, torch.Tensor):
        return _share_of_zeros(subject)
    if isinstance(subject, Mapping):
        return as_mask(subject).sparsity
    raise MaskError(f"compute_sparsity takes a mask, a tensor or a model, got {type(subject).__name__}.")


def get_model_size(model: nn.Module) -> ModelSize:
    """Parameters and bytes of a model, and of a mask for it.

    Args:
        model: Any module whose weights are loaded.

    Returns:
        A `ModelSize`.

    Raises:
        WeightsError: Prunable parameters on the meta device.

    Example:
        >>> import torch
        >>> from lottery_tickets import get_model_size
        >>> size = get_model_size(torch.nn.Linear(8, 8))
        >>> size["parameters"], size["prunable_parameters"], size["bytes_by_dtype"], size["mask_bytes"]
        (72, 64, {'float32': 288}, 8)
    """
    everything = dict(model.named_parameters(remove_duplicate=False))
    parameters = [everything[names[0]] for names in parameter_aliases(model).values()]
    buffers = list(model.buffers())
    by_dtype: dict[str, int] = {}
    for tensor in (*parameters, *buffers):
        dtype = str(tensor.dtype).removeprefix("torch.")
        by_dtype[dtype] = by_dtype.get(dtype, 0) + tensor.numel() * tensor.element_size()
    prunable = _prunable_numels(model)
    return ModelSize(
        parameters=sum(parameter.numel() for parameter in parameters),
        trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        prunable_parameters=sum(prunable),
        buffers=sum(buffer.numel() for buffer in buffers),
        bytes=sum(by_dtype.values()),
        bytes_by_dtype=by_dtype,
        mask_bytes=sum(packed_size(numel) for numel in prunable),
    )


def _checks(parameters: Mapping[str, torch.Tensor], ticket: Mask) -> dict[str, TensorCheck]:
    kept = ticket.layer_kept()
    problems = {name: _misfit(parameters.get(name), ticket.shapes[name]) for name in ticket}
    found = _wrong_weights({name: parameters[name] for name, problem in problems.items() if not problem}, ticket)
    return {
        name: _check(ticket.shapes[name].numel() - kept[name], *found.get(name, (0, 0)), problem)
        for name, problem in problems.items()
    }


def _check(pruned: int, not_zero: int, nan: int, problem: str) -> TensorCheck:
    problems = [problem] if problem else []
    if not_zero:
        problems.append(f"{not_zero} of {pruned} pruned weights are not zero")
    if nan:
        problems.append(f"{nan} weights are NaN")
    return TensorCheck(pruned=pruned, not_zero=not_zero, nan=nan, problems=problems)


def _misfit(parameter: torch.Tensor | None, shape: torch.Size) -> str:
    """Why a parameter cannot be looked at; empty if it can."""
    if parameter is None:
        return "the model has no such parameter"
    if isinstance(parameter, nn.parameter.UninitializedParameter) or parameter.is_meta:
        return "the parameter has no values (meta device, or not initialised)"
    return "" if parameter.shape == shape else f"mask {tuple(shape)}, parameter {tuple(parameter.shape)}"


def _wrong_weights(parameters: Mapping[str, torch.Tensor], ticket: Mask) -> dict[str, tuple[int, int]]:
    """Pruned weights that are not zero, and weights that are NaN; of parts, over all ranks."""
    division = Division.of(parameters)
    if division is None:
        return {name: _counts(one.detach(), ticket.packed(name)) for name, one in parameters.items()}
    counts = np.zeros((len(parameters), 2), np.int64)
    for place, (name, parameter) in enumerate(parameters.items()):
        if name in division.counted:
            counts[place] = _counts(local_of(parameter), division.shards[name].cut(ticket.packed(name)))
    return dict(zip(parameters, map(tuple, division.ranks.sum(counts).tolist()), strict=True))


def _counts(weight: torch.Tensor, packed: PackedBits) -> tuple[int, int]:
    flat, not_zero, nan = weight.reshape(-1), 0, 0
    for start in range(0, flat.numel(), _BLOCK):
        block = flat[start : start + _BLOCK]
        kept = unpack_range(packed, start, start + block.numel()).to(block.device)
        not_zero += int(((block != 0) & ~kept).sum())
        nan += int(block.isnan().sum())
    return not_zero, nan


def _share_of_zeros(*tensors: torch.Tensor) -> float:
    numel = sum(tensor.numel() for tensor in tensors)
    zeros = numel - sum(int(torch.count_nonzero(tensor)) for tensor in tensors)
    return zeros / numel if numel else 0.0


def _prunable_numels(model: nn.Module) -> list[int]:
    try:
        return [parameter.numel() for parameter in prunable_parameters(model).values()]
    except ParameterSelectionError:
        return []
