"""From whatever a user has of a model to its parameters' shapes, on the meta device: nothing is loaded."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lottery_tickets.errors import MissingExtraError, PlanError
from lottery_tickets.planning._configs import shipped_config, shipped_names

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def dtype_of(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A data type by its name.

    Raises:
        PlanError: Another name, or a type that weights are not trained in.
    """
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    if dtype in DTYPES:
        return DTYPES[dtype]
    raise PlanError(f"dtype is one of {', '.join(DTYPES)}, or None for the model's own; got {dtype!r}.")


def shapes_of(model_or_config: Any, dtype: torch.dtype | None) -> nn.Module:
    """The model, on the meta device unless it is the user's own and has this data type already.

    Args:
        model_or_config: A module, a transformers config, a path to one or to its folder, or a shipped name.
        dtype: Of the weights; None for the model's own.

    Raises:
        PlanError: What is none of these, or what transformers cannot build.
        MissingExtraError: transformers is not installed and is needed.
    """
    if isinstance(model_or_config, nn.Module):
        return model_or_config if dtype is None else in_dtype(model_or_config, dtype)
    if isinstance(model_or_config, (str, os.PathLike)):
        return _built(_config_of(model_or_config), dtype, str(model_or_config))
    if isinstance(model_or_config, dict):
        return _built(_config_from(dict(model_or_config), "the config"), dtype, "the config")
    if hasattr(model_or_config, "model_type"):
        return _built(model_or_config, dtype, type(model_or_config).__name__)
    raise PlanError(
        "Expected a module, a transformers config, a path to config.json or its folder, or a name such as "
        f"'Qwen2.5-14B'; got {type(model_or_config).__name__}."
    )


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model's structure on the meta device, its floating-point numbers of this type; no weight is copied."""
    numbers = [*model.parameters(), *model.buffers()]
    if all(one.dtype == dtype for one in numbers if one.is_floating_point()):
        return model
    return on_meta(model, dtype)


def on_meta(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of the model's structure on the meta device, in this type or its own; no weight is copied."""
    twins: dict[int, Any] = {}
    for one in [*model.parameters(), *model.buffers()]:
        twin = one.detach().to("meta", dtype if dtype and one.is_floating_point() else one.dtype)
        twins[id(one)] = nn.Parameter(twin, one.requires_grad) if isinstance(one, nn.Parameter) else twin
    return copy.deepcopy(model, twins)


def _config_of(given: str | os.PathLike[str]) -> Any:
    path = Path(given).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise PlanError(f"{file}: not JSON ({error}); give a config.json of transformers.") from error
        if not isinstance(read, dict):
            raise PlanError(f"{file}: expected a JSON object, got {type(read).__name__}.")
        return _config_from(read, str(file))
    shipped = shipped_config(str(given))
    if shipped is not None:
        return _config_from(dict(shipped["config"]), str(given))
    raise PlanError(
        f"{given}: no config.json there, and no shipped configuration of this name; there are "
        f"{', '.join(shipped_names())}."
    )


def _config_from(read: dict[str, Any], where: str) -> Any:
    transformers = _transformers()
    kind = read.pop("model_type", None)
    if not isinstance(kind, str):
        raise PlanError(f"{where}: no model_type, so transformers cannot tell the architecture.")
    try:
        return transformers.AutoConfig.for_model(kind, **read)
    except Exception as error:  # a configuration raises whatever it happens to run into
        raise PlanError(f"{where}: transformers cannot read it: {_first_line(error)}") from error


def _built(config: Any, dtype: torch.dtype | None, where: str) -> nn.Module:
    transformers = _transformers()
    own = getattr(config, "dtype", None)
    own = DTYPES.get(own, torch.float32) if isinstance(own, str) else own
    named = next(iter(getattr(config, "architectures", None) or ()), None)
    architecture = getattr(transformers, str(named), None) or transformers.AutoModelForCausalLM
    try:
        with torch.device("meta"):
            # Auto classes have another name for it than architectures do.
            make = getattr(architecture, "_from_config", None) or architecture.from_config
            model: nn.Module = make(config, dtype=dtype or own or torch.float32)
    except Exception as error:  # as above
        raise PlanError(f"{where}: transformers cannot build it: {_first_line(error)}") from error
    return model


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf") from error
    return transformers


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
