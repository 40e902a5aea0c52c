"""Which weight gradients can be read off beside their layers, and which have to be asked for sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lottery_tickets.gradients._layers import input_of, is_stock_layer
from lottery_tickets.training import uses_of

# Canonical name to the modules and attributes that hold the parameter.
Places = Mapping[str, Sequence[tuple[nn.Module, str]]]


@dataclass(frozen=True)
class Plan:
    """How the gradients of some parameters are come by.

    Attributes:
        tapped: Name to the layers beside which the gradient of each sample can be read.
        others: Name to the parameter objects (tied ones are several) that autograd itself has to differentiate.
        singly: Samples go through the model one by one.
    """

    tapped: Mapping[str, Sequence[nn.Module]]
    others: Mapping[str, Sequence[nn.Parameter]]
    singly: bool

    @classmethod
    def of(cls, places: Places, tapped: Collection[str], *, singly: bool) -> Plan:
        """That which taps the layers of these parameters."""
        layers, objects = _layers_of(places), _objects_of(places)
        others = {name: objects[name] for name in places if name not in tapped}
        return cls({name: layers[name] for name in places if name in tapped}, others, singly)

    def one_by_one(self) -> Plan:
        """The same, samples going through the model one by one."""
        return replace(self, singly=True)

    def only(self, names: Sequence[str]) -> Plan:
        """The same for some of the parameters."""
        return Plan(
            {name: self.tapped[name] for name in names if name in self.tapped},
            {name: self.others[name] for name in names if name in self.others},
            self.singly,
        )


class Seen(NamedTuple):
    """What one sample's forward pass tells of a model.

    Attributes:
        tapped: Names of parameters whose gradient can be read beside their layers.
        singly: Whether samples have to go through the model one by one, if gradients are wanted by sample.
    """

    tapped: frozenset[str]
    singly: bool


def look_at(places: Places, forward: Callable[[], torch.Tensor]) -> Seen:
    """Look at one sample's forward pass.

    A parameter is tapped if every way from it to the loss leads through a layer of a known kind that was called,
    which shows in autograd's graph: as many edges as calls. A sample has to be a row of the layer's input.

    Args:
        places: Where the parameters are.
        forward: Runs one sample and gives its loss with its graph.
    """
    objects, layers = _objects_of(places), _layers_of(places)
    names = {id(one): name for name, ones in objects.items() for one in ones}
    calls: Counter[str] = Counter()
    flattened: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            calls[name] += 1
            # Where weights lie in parts, a whole one stands in its place for the time of the pass.
            names[id(layer.weight)] = name
            if input_of(layer, args, kwargs).shape[0] != 1:
                flattened.add(name)

        return hook

    handles = [
        layer.register_forward_hook(watch(name), with_kwargs=True, prepend=True)
        for name, held in layers.items()
        for layer in held
    ]
    flags = [(one, one.requires_grad) for ones in objects.values() for one in ones]
    try:
        for one, _ in flags:
            one.requires_grad_(True)
        edges = uses_of(forward().grad_fn, names)
    finally:
        for handle in handles:
            handle.remove()
        for one, flag in flags:
            one.requires_grad_(flag)
    tapped = frozenset(name for name in places if calls[name] and calls[name] == edges[name])
    return Seen(tapped, len(tapped) < len(places) or bool(flattened & tapped))


def _objects_of(places: Places) -> dict[str, list[nn.Parameter]]:
    """Name to the parameter objects; tied ones may be several."""
    found = {name: [module._parameters[key] for module, key in held] for name, held in places.items()}
    return {name: list({id(one): one for one in ones if one is not None}.values()) for name, ones in found.items()}


def _layers_of(places: Places) -> dict[str, list[nn.Module]]:
    """Name to the layers of a known kind that hold a parameter, if it is the weight of all that hold it."""
    layers = {
        name: list(dict.fromkeys(module for module, _ in held))
        for name, held in places.items()
        if all(key == "weight" for _, key in held)
    }
    return {name: [one for one in held if is_stock_layer(one)] for name, held in layers.items()}
