"""Which weight gradients can be read off beside their layers, and which have to be asked for sample by sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from lottery_tickets.gradients._layers import input_of, is_stock_layer
from lottery_tickets.training import uses_of


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


def plan_for(
    places: Mapping[str, Sequence[tuple[nn.Module, str]]],
    forward: Callable[[], torch.Tensor],
    *,
    by_sample: bool,
) -> Plan:
    """Look at one sample's forward pass.

    A parameter is tapped if every way from it to the loss leads through a layer of a known kind that was called,
    which shows in autograd's graph: as many edges as calls. A sample has to be a row of the layer's input.

    Args:
        places: Canonical name to the modules and attributes that hold the parameter.
        forward: Runs one sample and gives its loss with its graph.
        by_sample: Gradients of single samples are wanted, not of whole batches.
    """
    parameters = {name: [module._parameters[key] for module, key in held] for name, held in places.items()}
    objects: dict[str, list[nn.Parameter]] = {
        name: list({id(one): one for one in ones if one is not None}.values()) for name, ones in parameters.items()
    }
    names = {id(one): name for name, ones in objects.items() for one in ones}
    layers = {
        name: list(dict.fromkeys(module for module, _ in held))
        for name, held in places.items()
        if all(key == "weight" for _, key in held)
    }
    layers = {name: [one for one in held if is_stock_layer(one)] for name, held in layers.items()}
    calls: Counter[str] = Counter()
    flattened: set[str] = set()

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
            calls[name] += 1
            if input_of(layer, args, kwargs).shape[0] != 1:
                flattened.add(name)

        return hook

    handles = [
        layer.register_forward_hook(watch(name), with_kwargs=True)
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
    tapped = {name: layers[name] for name in places if calls[name] and calls[name] == edges[name]}
    others = {name: objects[name] for name in places if name not in tapped}
    return Plan(tapped, others, singly=by_sample and bool(others or flattened & tapped.keys()))
