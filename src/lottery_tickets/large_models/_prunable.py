"""Which tensors of a checkpoint are prunable, and their names: by its architecture, else by their names alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from lottery_tickets.errors import CheckpointError, ParameterSelectionError
from lottery_tickets.large_models import _name_rule
from lottery_tickets.large_models._checkpoints import Checkpoint, StoredTensor
from lottery_tickets.large_models._names import same_bytes
from lottery_tickets.large_models._pages import TYPES
from lottery_tickets.large_models._skeletons import UnknownArchitectureError, keys_of_parameters, skeletons
from lottery_tickets.masks import Patterns, chosen_parameters, matching_names
from lottery_tickets.sparsity import Layout, layouts_of

_log = logging.getLogger(__name__)


class Prunable(NamedTuple):
    """Prunable tensors of a checkpoint, in the order of the model.

    Attributes:
        stored: Name in a mask to where the tensor lies.
        layouts: Name to which dimension runs over the inputs; a name without one may have either.
    """

    stored: dict[str, StoredTensor]
    layouts: dict[str, Layout]


def prunable_tensors(
    checkpoint: Checkpoint, include: Patterns, exclude: Patterns, *, only_weights: bool
) -> Prunable:
    """What `prunable_parameters` would choose of the loaded model, without loading it.

    Args:
        checkpoint: Where to look.
        include: See `prunable_parameters`; predicates are given parameters on the meta device.
        exclude: Likewise.
        only_weights: Likewise.

    Raises:
        CheckpointError: Neither the architecture nor the names tell which tensors are layers, the model is stored
            otherwise than it is loaded, or a prunable tensor is of a data type without magnitudes.
        ParameterSelectionError: A pattern that matches nothing, or nothing left to prune.
    """
    try:
        found = _by_architecture(checkpoint, include, exclude, only_weights=only_weights)
    except UnknownArchitectureError as reason:
        _log.info("%s: prunable tensors are told by their names: %s", checkpoint.folder, reason)
        found = _by_names(checkpoint, include, exclude, str(reason), only_weights=only_weights)
    for name, tensor in found.stored.items():
        if tensor.dtype not in TYPES:
            raise CheckpointError(
                f"{checkpoint.folder / tensor.file}: {name} is stored as {tensor.dtype}, which has no magnitudes "
                f"to rank; {', '.join(TYPES)} have. Give the checkpoint before it was quantized, or exclude it."
            )
    return found


# --- By architecture ---


def _by_architecture(
    checkpoint: Checkpoint, include: Patterns, exclude: Patterns, *, only_weights: bool
) -> Prunable:
    misfits = []
    for model in skeletons(checkpoint):
        chosen = chosen_parameters(model, include, exclude, only_weights=only_weights)
        keys = keys_of_parameters(model, chosen, checkpoint)
        problems = _problems(chosen, keys, checkpoint)
        if not problems:
            stored = {name: checkpoint.tensors[keys[name]] for name in chosen}
            return Prunable(stored, layouts_of(model, chosen))
        misfits.append((len(problems), f"{type(model).__name__} has {'; '.join(problems[:3])}"))
    quantized = ", being quantized" if "quantization_config" in (checkpoint.config() or {}) else ""
    raise CheckpointError(
        f"{checkpoint.folder} is not stored as its model is loaded{quantized}: {min(misfits)[1]}. Load the model "
        "and draw the mask from it."
    )


def _problems(chosen: Mapping[str, nn.Parameter], keys: Mapping[str, str], checkpoint: Checkpoint) -> list[str]:
    problems = []
    for name, parameter in chosen.items():
        stored = checkpoint.tensors.get(keys[name])
        if stored is None:
            problems.append(f"{name}, which is not stored")
        elif stored.shape != parameter.shape:
            problems.append(f"{name} as {tuple(parameter.shape)}, stored as {tuple(stored.shape)}")
    return problems


# --- By names ---


def _by_names(
    checkpoint: Checkpoint, include: Patterns, exclude: Patterns, reason: str, *, only_weights: bool
) -> Prunable:
    parameters = {
        key: nn.Parameter(torch.empty(tensor.shape, dtype=TYPES[tensor.dtype], device="meta"), requires_grad=False)
        for key, tensor in checkpoint.tensors.items()
        if tensor.dtype in TYPES
    }
    included = matching_names(include, parameters, "include")
    excluded = matching_names(exclude, parameters, "exclude")
    kinds = {key: _name_rule.kind_of(key, len(tensor.shape)) for key, tensor in checkpoint.tensors.items()}
    embeddings = [key for key, kind in kinds.items() if kind == "embedding"]
    chosen = set(included)
    for key, kind in kinds.items():
        if kind is None and key not in included | excluded:
            raise CheckpointError(
                f"{checkpoint.folder / checkpoint.tensors[key].file}: whether {key} is a layer cannot be told: "
                f"{reason}, and no rule knows the name. Say it by include= or exclude=, or load the model."
            )
        tied = kind == "head" and any(same_bytes(checkpoint, key, other) for other in embeddings)
        if kind == "layer" or (kind == "head" and not tied):
            chosen.add(key)
    if not only_weights:
        biases = {f"{key.rpartition('.')[0]}.bias" for key in chosen}
        chosen |= biases & checkpoint.tensors.keys()
    names = _name_rule.in_model_order(chosen - excluded)
    if not names:
        raise ParameterSelectionError(
            f"{checkpoint.folder} has nothing to prune: no tensor has the name of a layer. include='*.weight' "
            "widens the choice."
        )
    layouts = {name: Layout() for name in names if not _name_rule.has_either_layout(name)}
    return Prunable({name: checkpoint.tensors[name] for name in names}, layouts)
