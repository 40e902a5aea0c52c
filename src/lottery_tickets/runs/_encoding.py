"""Nested state, such as an optimizer's, as JSON beside named tensors: nothing on disk is code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lottery_tickets._dtensors import is_sharded
from lottery_tickets.errors import RunFolderError

Json = None | bool | int | float | str | list[Any] | dict[str, Any]

_TENSOR, _MAP, _TUPLE = "tensor", "map", "tuple"


def encoded(value: Any, tensors: dict[str, torch.Tensor], name: str = "") -> Json:
    """A value as JSON; the tensors in it go to `tensors`, under names that say where they stood.

    Args:
        value: None, numbers, text, tensors, lists, tuples, and mappings from numbers or text to such.
        tensors: Takes up the tensors themselves, not copies.
        name: What the value is, for the names and for messages.

    Raises:
        RunFolderError: Anything else; the message says what and where.

    Example:
        >>> import torch
        >>> from lottery_tickets.runs import decoded, encoded
        >>> tensors = {}
        >>> text = encoded({0: {"step": 3, "average": torch.ones(2), "betas": (0.9, 0.99)}}, tensors, "state")
        >>> list(tensors)
        ['state.0.average']
        >>> decoded(text, tensors)[0]["betas"]
        (0.9, 0.99)
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, torch.nn.Parameter) and not is_sharded(value):
            raise RunFolderError(
                f"{name} is a {type(value).__name__}, which no safetensors file can hold. Run without run_dir, or "
                "with another optimizer."
            )
        unused = name if name not in tensors else f"{name} ({len(tensors)})"
        tensors[unused] = value.detach()
        return {_TENSOR: unused}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, (int, str)):
                raise RunFolderError(f"{name} has the key {key!r}; numbers and text can be written.")
        return {_MAP: [[key, encoded(one, tensors, f"{name}.{key}")] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        listed = [encoded(one, tensors, f"{name}.{place}") for place, one in enumerate(value)]
        return {_TUPLE: listed} if isinstance(value, tuple) else listed
    raise RunFolderError(
        f"{name} is of type {type(value).__name__}; numbers, text, tensors and lists and mappings of them can be "
        "written. Run without run_dir, or with another optimizer or scheduler."
    )


def decoded(value: Json, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What `encoded` was given."""
    if isinstance(value, list):
        return [decoded(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    ((kind, inside),) = value.items()
    if kind == _TENSOR:
        return tensors[inside]
    if kind == _TUPLE:
        return tuple(decoded(one, tensors) for one in inside)
    return {key: decoded(one, tensors) for key, one in inside}
