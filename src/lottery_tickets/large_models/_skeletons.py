"""A checkpoint's model without its weights, as transformers makes it from `config.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models._checkpoints import Checkpoint
from lottery_tickets.large_models._names import located, same_bytes
from lottery_tickets.masks import parameter_aliases


class UnknownArchitectureError(Exception):
    """Why the architecture cannot be asked."""


def skeletons(checkpoint: Checkpoint, *, named_first: bool = False) -> Iterator[Any]:
    """Models on the meta device that the checkpoint may be meant for.

    Args:
        checkpoint: With a `config.json`.
        named_first: Begin with the classes that it names; else with the language model, which prunes as they do.

    Raises:
        UnknownArchitectureError: No config.json, none that transformers knows, or no transformers.
        CheckpointError: A config.json that does not fit the files.
    """
    config = _parsed_config(checkpoint)
    import transformers

    classes: list[Any] = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    named = [one._from_config for one in classes if hasattr(one, "_from_config")]
    language_model = transformers.AutoModelForCausalLM.from_config
    failures = []
    built = 0
    for make in (
        *([*named, language_model] if named_first else [language_model, *named]),
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
        raise UnknownArchitectureError(f"transformers cannot make its model ({failures[0]})")


def keys_of_parameters(
    model: nn.Module, chosen: Mapping[str, nn.Parameter], checkpoint: Checkpoint
) -> dict[str, str]:
    """Canonical name to key; a tied tensor may be stored under any of its names."""
    stored_as = {
        names[0]: next((name for name in names if name in checkpoint.tensors), names[0])
        for names in parameter_aliases(model).values()
        if names[0] in chosen
    }
    keys = located(list(stored_as.values()), checkpoint.tensors)
    return {name: keys.get(alias, alias) for name, alias in stored_as.items()}


def _parsed_config(checkpoint: Checkpoint) -> Any:
    if checkpoint.config() is None:
        raise UnknownArchitectureError("there is no config.json")
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise UnknownArchitectureError("transformers is not installed") from error
    try:
        config = AutoConfig.from_pretrained(checkpoint.folder)
    except Exception as error:  # as above
        line = str(error).strip().partition("\n")[0]
        raise UnknownArchitectureError(f"transformers does not know its config.json ({line})") from error
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
