"""One operation of a model's graph, its arguments by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from lottery_tickets._structured._indices import Dims, Indices, Value

Results = Value | tuple[Value, ...]


class Call:
    """An operation on tensors.

    Args:
        node: Of the graph.
        known: What each earlier node gave.
        indices: Where its rule tells what it learns.

    Attributes:
        indices: As given.
        name: Of the operation, such as "aten::linear".
    """

    def __init__(self, node: fx.Node, known: Mapping[fx.Node, Results], indices: Indices) -> None:
        self.indices = indices
        self._node, self._known = node, known
        schema = getattr(node.target, "_schema", None)
        self.name = str(node.target) if schema is None else str(schema.name)
        self._arguments: dict[str, Any] = dict(node.kwargs)
        if schema is not None:
            self._arguments |= {one.name: value for one, value in zip(schema.arguments, node.args, strict=False)}
            for one in schema.arguments:
                self._arguments.setdefault(one.name, one.default_value if one.has_default_value() else None)

    @property
    def why(self) -> str:
        """For pins: that this operation stands in the way."""
        return f"{self.name.replace('aten::', '')} ({self._node.name}) needs it whole"

    def get(self, name: str, default: Any = None) -> Any:
        """An argument as the graph has it."""
        return self._arguments.get(name, default)

    def value(self, name: str) -> Value | None:
        """What is known of a tensor argument; None if there is none."""
        argument = self._arguments.get(name)
        return self._of(argument) if isinstance(argument, fx.Node) else None

    def given(self, name: str) -> Value:
        """What is known of a tensor argument that cannot be missing."""
        value = self.value(name)
        assert value is not None, (self.name, name)
        return value

    def listed(self, name: str) -> list[Value]:
        """What is known of the tensors of a list."""
        return [self._of(one) for one in self._arguments[name]]

    def tensors(self) -> Iterator[Value]:
        """What is known of every tensor that goes in."""
        for node in self._node.all_input_nodes:
            found = self._known[node]
            yield from (found,) if isinstance(found, Value) else found

    def operands(self) -> Iterator[tuple[Value, tuple[int, ...]]]:
        """Every tensor that goes in, with its shape."""
        for node in self._node.all_input_nodes:
            shape = shape_of(node)
            assert shape is not None, self.name
            yield self._of(node), shape

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what comes out."""
        shape = shape_of(self._node)
        assert shape is not None, self.name
        return shape

    def shape_in(self, name: str) -> tuple[int, ...]:
        """Of a tensor argument."""
        shape = shape_of(self._arguments[name])
        assert shape is not None, (self.name, name)
        return shape

    def unknown(self) -> Results:
        """Nothing is known of what comes out."""
        return unknown(self._node)

    def refuse(self) -> Results:
        """Keep all that goes in."""
        self.indices.pin_all(self.tensors(), self.why)
        return self.unknown()

    def _of(self, node: fx.Node) -> Value:
        found = self._known[node]
        assert isinstance(found, Value), self.name
        return found


def shape_of(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a node's tensor, None if it gives none; sizes are numbers, for examples have fixed shapes."""
    made = node.meta.get("val")
    return tuple(int(size) for size in made.shape) if isinstance(made, torch.Tensor) else None


def unknown(node: fx.Node) -> Results:
    """Tensors of which no index leaves, as many as a node gives."""
    made = node.meta.get("val")
    if isinstance(made, (tuple, list)):
        return tuple(_whole(one) for one in made)
    return _whole(made)


def _whole(made: Any) -> Value:
    return Value((None,) * made.dim() if isinstance(made, torch.Tensor) else ())


def dim_of(dim: int, dims: Dims) -> int:
    """A dimension counted from the front."""
    return dim % len(dims) if dims else 0
