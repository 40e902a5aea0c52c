"""A model's numbers as named tensors, each once, and back into the model's own memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import nn

from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import local_of, parameter_aliases, reshard
from lottery_tickets.training._parts import copy_part


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, those that are tied once; not copies.

    Modules in parts go back to their shards first, and their parameters are DTensors.
    """
    reshard(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found: dict[str, torch.Tensor] = {
        names[0]: parameters[names[0]] for names in parameter_aliases(model).values()
    }
    found.update(model.named_buffers())
    return {name: tensor.detach() for name, tensor in found.items()}


def restore_tensors(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Write what `tensors_of` gave into the model; of whole tensors a model in parts takes its own.

    Raises:
        TrainingError: Names, shapes or data types that are not the model's.
    """
    own = tensors_of(model)
    problems = sorted(own.keys() ^ saved.keys()) + [
        f"{name} {tuple(tensor.shape)} {tensor.dtype}"
        for name, tensor in saved.items()
        if name in own and (own[name].shape, own[name].dtype) != (tensor.shape, tensor.dtype)
    ]
    if problems:
        raise TrainingError(
            f"The state that was saved is not of this {type(model).__name__}: {', '.join(problems)}. Give the "
            "model that the run was started with."
        )
    for name, tensor in saved.items():
        copy_part(name, tensor, own[name], local_of(own[name]))


def structure_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and data types of parameters and buffers: equal for models that can take each
    other's state.
    """
    told = [[name, list(tensor.shape), str(tensor.dtype)] for name, tensor in tensors_of(model).items()]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, shapes, data types and bits, in the order of the sorted names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        # Of one element or none any stride passes for contiguous, and bytes are seen through a stride of 1 alone.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()
