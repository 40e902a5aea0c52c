"""Which tensors of a checkpoint are prunable, and their names: by its architecture, else by their names alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from lottery_tickets.errors import CheckpointError, ParameterSelectionError
from lottery_tickets.large_models import _name_rule
from lottery_tickets.large_models._checkpoints import Checkpoint, StoredTensor
from lottery_tickets.large_models._names import located, same_bytes
from lottery_tickets.large_models._pages import TYPES
from lottery_tickets.masks import Patterns, chosen_parameters, matching_names, parameter_aliases
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
    except _UnknownArchitectureError as reason:
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


class _UnknownArchitectureError(Exception):
    """Why the architecture cannot be asked."""


def _by_architecture(
    checkpoint: Checkpoint, include: Patterns, exclude: Patterns, *, only_weights: bool
) -> Prunable:
    misfits = []
    for model in _skeletons(checkpoint):
        chosen = chosen_parameters(model, include, exclude, only_weights=only_weights)
        keys = _keys_of(model, chosen, checkpoint)
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


def _skeletons(checkpoint: Checkpoint) -> Iterator[nn.Module]:
    """Models without weights that the checkpoint may be meant for, the usual one first."""
    config = _parsed_config(checkpoint)
    import transformers

    named: list[Any] = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    failures = []
    built = 0
    for make in (
        transformers.AutoModelForCausalLM.from_config,
        *(one._from_config for one in named if hasattr(one, "_from_config")),
        transformers.AutoModel.from_config,
    ):
        try:
            model = _untied_where_stored_so(make, config, checkpoint)
        except CheckpointError:
            raise
        except Exception as error:  # a damaged configuration raises whatever it happens to run into
            failures.append(str(error).strip().partition("\n")[0])
            continue
        built += 1
        yield model
    if not built:
        raise _UnknownArchitectureError(f"transformers cannot make its model ({failures[0]})")


def _parsed_config(checkpoint: Checkpoint) -> Any:
    if checkpoint.config() is None:
        raise _UnknownArchitectureError("there is no config.json")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise _UnknownArchitectureError("transformers is not installed") from error
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
    except Exception as error:  # as above
        line = str(error).strip().partition("\n")[0]
        raise _UnknownArchitectureError(f"transformers does not know its config.json ({line})") from error
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > len(checkpoint.tensors):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json speaks of {layers} layers, and {len(checkpoint.tensors)} tensors "
            "are stored; get the checkpoint again."
        )
    return config


def _untied_where_stored_so(make: Any, config: Any, checkpoint: Checkpoint) -> nn.Module:
    """The model on the meta device; loading does not tie what is stored twice and differs."""
    with torch.device("meta"):
        model: nn.Module = make(config)
        for names in parameter_aliases(model).values():
            keys = [key for key in located(names, checkpoint.tensors).values() if key in checkpoint.tensors]
            if len(keys) > 1 and not all(same_bytes(checkpoint, keys[0], key) for key in keys[1:]):
                config.tie_word_embeddings = False
                return make(config)  # type: ignore[no-any-return]
    return model


def _keys_of(model: nn.Module, chosen: Mapping[str, nn.Parameter], checkpoint: Checkpoint) -> dict[str, str]:
    """Canonical name to key; a tied tensor may be stored under any of its names."""
    stored_as = {
        names[0]: next((name for name in names if name in checkpoint.tensors), names[0])
        for names in parameter_aliases(model).values()
        if names[0] in chosen
    }
    keys = located(list(stored_as.values()), checkpoint.tensors)
    return {name: keys.get(alias, alias) for name, alias in stored_as.items()}


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
