"""What the outcome of a training depends on, as JSON that can be compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lottery_tickets.masks import unsharded_class
from lottery_tickets.training._order import DataOrder
from lottery_tickets.training._snapshots import structure_digest

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def configuration(function: str, model: nn.Module, order: DataOrder, *parts: DataclassInstance) -> dict[str, Any]:
    """The fields of these parts, the model's structure and the data's length; what is no data is told by name.

    Args:
        function: What was called.
        model: Its class, size and structure count, not its weights.
        order: The data.
        parts: Dataclasses of settings.
    """
    structure = {
        "class": unsharded_class(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "structure": structure_digest(model),
    }
    told = {field.name: described(getattr(part, field.name)) for part in parts for field in fields(part)}
    return {"function": function, "model": structure, "batches": order.length, **told}


def described(value: Any) -> Any:
    """A setting as JSON: a function by its name, a partial one with what it is given."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [described(one) for one in value]
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, partial):
        return {"partial": described(value.func), "with": [described(value.args), described(value.keywords)]}
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{named.__module__}.{named.__qualname__}"
