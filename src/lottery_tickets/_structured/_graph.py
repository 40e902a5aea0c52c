"""The units of a model, read off the graph of one forward pass.

torch.export writes down what the model computes, on tensors without data. Every operation has a rule that says
which indices of its inputs, outputs and weights belong together; an operation without a rule needs all that goes
into it whole. So what is called a unit can leave, whatever the model: what the rules do not know costs units,
never correctness.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import fx, nn

from lottery_tickets._batches import evaluating
from lottery_tickets._structured._call import Call, Results, unknown
from lottery_tickets._structured._grouping import Place, Structure, structure_of
from lottery_tickets._structured._indices import Dims, Indices, Value
from lottery_tickets._structured._layers import RULES as LAYERS
from lottery_tickets._structured._shapes import RULES as SHAPES
from lottery_tickets.errors import StructureError
from lottery_tickets.masks import parameter_aliases

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_RULES = {**SHAPES, **LAYERS}


def read_structure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
    """The units of a model that computes with these example inputs.

    Raises:
        StructureError: A graph that cannot be traced.
    """
    program = _exported(model, args, kwargs)
    indices = Indices()
    tensors = _Tensors(model, program, indices)
    known: dict[fx.Node, Results] = {}
    for node in program.graph.nodes:
        known[node] = _read(node, known, indices, tensors)
    return structure_of(indices, tensors.places())


def _read(node: fx.Node, known: Mapping[fx.Node, Results], indices: Indices, tensors: _Tensors) -> Results:
    if node.op == "placeholder":
        return tensors.value_of(node)
    if node.op == "output":
        for one in node.all_input_nodes:
            found = known[one]
            indices.pin_all((found,) if isinstance(found, Value) else found, "it is what the model gives")
        return unknown(node)
    if node.target is operator.getitem:
        pieces = known[cast(fx.Node, node.args[0])]
        return pieces[cast(int, node.args[1])] if isinstance(pieces, tuple) else unknown(node)
    if node.op != "call_function":
        return unknown(node)
    call = Call(node, known, indices)
    if not any(nodes is not None for value in call.tensors() for nodes in value.dims):
        return call.unknown()
    rule = _RULES.get(call.name)
    return call.refuse() if rule is None else rule(call)


class _Tensors:
    """The parameters and buffers of a model, with a node for each index of each dimension."""

    def __init__(self, model: nn.Module, program: ExportedProgram, indices: Indices) -> None:
        self._indices = indices
        self._canonical = {alias: names[0] for names in parameter_aliases(model).values() for alias in names}
        signature = program.graph_signature
        self._targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self._buffers = set(signature.inputs_to_buffers.values())
        self._values: dict[str, Value] = {}
        self._order = {name: place for place, name in enumerate(self._canonical)}

    def value_of(self, node: fx.Node) -> Value:
        """Nodes for a parameter or a buffer, the same for all its names; inputs have none."""
        target = self._targets.get(node.name)
        if target is None:
            given = unknown(node)
            return given if isinstance(given, Value) else Value(())
        name = self._canonical.get(target, target)
        if name not in self._values:
            dims: Dims = tuple(self._indices.new(size) if size > 1 else None for size in node.meta["val"].shape)
            self._values[name] = Value(dims, weight=name not in self._buffers)
        return self._values[name]

    def places(self) -> list[Place]:
        """Every dimension of every tensor: parameters in the order of the model, then buffers."""
        last = len(self._order)
        names = sorted(self._values, key=lambda name: (self._order.get(name, last), name))
        return [
            Place(name, dim, nodes)
            for name in names
            for dim, nodes in enumerate(self._values[name].dims)
            if nodes is not None
        ]


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> ExportedProgram:
    try:
        with evaluating(model):
            return torch.export.export(model, args, dict(kwargs), strict=False)
    except Exception as error:
        # torch.export raises whatever the model's own code does when it cannot be followed.
        raise StructureError(
            f"{type(model).__name__} cannot be traced by torch.export, so it is not known which of its parts "
            f"leave together: {type(error).__name__}: {_first_line(error)}. Give example_inputs that its forward "
            "takes; branches on the values of tensors cannot be traced."
        ) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
