"""The ends of a path: states of a model, from memory or a file, each tensor checked against the model's own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lottery_tickets.errors import CheckpointError, StateMismatchError, WeightsError
from lottery_tickets.masks import Mask, parameter_aliases

State = Mapping[str, torch.Tensor] | str | os.PathLike[str]


class Own(NamedTuple):
    """A tensor of the model.

    Attributes:
        tensor: Itself, not a copy.
        names: All that it goes by, the canonical one first.
        optional: A buffer that is no part of `state_dict`, so a state may lack it.
    """

    tensor: torch.Tensor
    names: list[str]
    optional: bool


def own_tensors(model: nn.Module) -> dict[str, Own]:
    """Parameters and buffers by canonical name, those that are tied once.

    Raises:
        WeightsError: A tensor on the meta device.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = {
        names[0]: Own(parameters[names[0]].detach(), names, optional=False)
        for names in parameter_aliases(model).values()
    }
    canonical: dict[int, str] = {}
    kept = _persistent_buffers(model)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        first = canonical.setdefault(id(buffer), name)
        known = found.get(first, Own(buffer.detach(), [], optional=True))
        found[first] = Own(known.tensor, [*known.names, name], known.optional and name not in kept)
    for name, own in found.items():
        if own.tensor.is_meta:
            raise WeightsError(f"{name} is on the meta device and has no values; load the model's weights first.")
    return found


def end_of(role: str, state: State, model: nn.Module, own: Mapping[str, Own]) -> dict[str, torch.Tensor]:
    """A state's tensors by canonical name: not copies, and those of a file mapped where the platform can.

    Args:
        role: The argument's name, for messages.
        state: What `tensors_of` or `state_dict()` gave, or the path of a safetensors file of it.
        model: For its class's name.
        own: What `own_tensors` gave.

    Raises:
        StateMismatchError: Names, shapes or data types that are not the model's, or tied tensors that differ.
        CheckpointError: A file that is not a whole safetensors file.
        FileNotFoundError: No such file.
        WeightsError: A tensor on the meta device.
    """
    tensors = state if isinstance(state, Mapping) else _read(role, state)
    problems = _strays(tensors, own)
    end = {}
    for name, one in own.items():
        there = [alias for alias in one.names if alias in tensors]
        if there:
            end[name] = tensors[there[0]]
            problems += _misfits(name, one, there, tensors)
        elif not one.optional:
            problems.append(f"{name}: missing")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise StateMismatchError(
            f"{role} is not a state of this {type(model).__name__}: {listed}. Give what tensors_of(model) or "
            "model.state_dict() gave for a model of the same structure and data types."
        )
    return {name: tensor.detach() for name, tensor in end.items()}


def refuse_nonfinite(
    role: str, end: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], mask: Mask | None
) -> None:
    """Raise WeightsError where an end has NaN or infinity between which and the other end no line leads.

    What both ends have alike, such as minus infinity in a buffer that says who attends to whom, is no obstacle;
    nor is what the mask removes.
    """
    for name, tensor in end.items():
        if _is_finite(tensor) or torch.equal(tensor, other[name].to(tensor.device)):
            continue
        if mask is not None and name in mask and _is_finite(tensor[mask[name].to(tensor.device)]):
            continue
        raise WeightsError(
            f"{role}: {name} holds NaN or infinite values, so there is no line to the other end. Give a state of "
            "a training that did not diverge."
        )


def _read(role: str, path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    if not isinstance(path, (str, os.PathLike)):
        raise StateMismatchError(
            f"{role}: expected a mapping from names to tensors or the path of a safetensors file, got "
            f"{type(path).__name__}."
        )
    if not Path(path).is_file():
        raise FileNotFoundError(f"{role}: {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is not a mapping
    except SafetensorError as error:
        raise CheckpointError(
            f"{role}: {path} is not a whole safetensors file ({error}); save the state with safetensors."
        ) from error


def _persistent_buffers(model: nn.Module) -> set[str]:
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._buffers
        if name not in module._non_persistent_buffers_set
    }


def _strays(tensors: Mapping[str, torch.Tensor], own: Mapping[str, Own]) -> list[str]:
    known = {name for one in own.values() for name in one.names}
    return [f"{name}: the model has no such tensor" for name in tensors if name not in known]


def _misfits(name: str, own: Own, there: list[str], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What is wrong with the tensors of a state that stand for one of the model's."""
    for alias in there:
        tensor = tensors[alias]
        if not isinstance(tensor, torch.Tensor):
            return [f"{alias}: a {type(tensor).__name__}, not a tensor"]
        if tensor.is_meta:
            raise WeightsError(f"{alias} is on the meta device and has no values; load the state first.")
        if (tensor.shape, tensor.dtype) != (own.tensor.shape, own.tensor.dtype):
            expected, got = (f"{tuple(one.shape)} {one.dtype}" for one in (own.tensor, tensor))
            return [f"{alias}: {got}, the model has {expected}"]
    first, *others = (tensors[alias] for alias in there)
    if any(one.data_ptr() != first.data_ptr() and not torch.equal(one, first) for one in others):
        return [f"{', '.join(there)}: tied in the model, so they cannot differ"]
    return []


def _is_finite(tensor: torch.Tensor) -> bool:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return all(bool(one.isfinite()) for one in torch.aminmax(tensor))  # NaN is both the least and the largest
