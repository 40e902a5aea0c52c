"""Weights that a module reads from files when it asks for them, and forgets when it is told to."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from lottery_tickets.errors import CheckpointError
from lottery_tickets.large_models._pages import FilePages
from lottery_tickets.masks import Mask, Place, masked_copy, places_of


class WeightsOnDemand:
    """The weights of a module that has none: reading `layer.weight` gives them, as they are stored or masked.

    Dense weights of the data type that they are stored in are the pages of the files themselves. Those of another
    type and masked ones are copies, made when they are first read and alive until `drop_copies`.

    Args:
        module: Its parameters tell shapes and data types; they become placeholders, and its layers read from here.
        tensors: Canonical name of every parameter to its weights, mapped from files.
        pages: Of the same files.

    Attributes:
        reads: Name to how often the weights came in from their file.
    """

    def __init__(self, module: nn.Module, tensors: Mapping[str, torch.Tensor], pages: FilePages) -> None:
        self._tensors, self._pages = tensors, pages
        parameters = {name: module.get_parameter(name) for name in tensors}
        self._dtypes = {name: parameter.dtype for name, parameter in parameters.items()}
        self._places = places_of(module, parameters)
        _read_from(self, self._places, parameters)
        self.reads: Counter[str] = Counter()
        self._ticket: Mask | None = None
        self._copies: dict[tuple[str, int], torch.Tensor] = {}
        self._open: set[str] = set()
        self._awaited = self._places_by_name()

    def use(self, ticket: Mask | None) -> None:
        """Give the weights of this ticket from now on; the dense ones for None."""
        self._ticket = ticket

    def read(self, name: str, place: Place) -> torch.Tensor:
        """The weights of a parameter, for the layer that has it there."""
        ticket = self._ticket if self._ticket is not None and name in self._ticket else None
        key = (name, 0 if ticket is None else id(ticket))
        if key not in self._copies:
            self._copies[key] = self._made(name, ticket)
        self._awaited[name].discard(place)
        return self._copies[key]

    def dense(self, name: str) -> torch.Tensor:
        """The dense weights of a parameter."""
        return self._made(name, None)

    def names_in(self, module: nn.Module) -> list[str]:
        """Parameters that a part of the module has."""
        inside = set(module.modules())
        return [name for name, places in self._places.items() if any(place.module in inside for place in places)]

    def names_outside(self, parts: Mapping[nn.Module, Iterable[str]]) -> list[str]:
        """Parameters that none of these parts has, but those of embeddings, of which a few rows are read."""
        inside = {name for names in parts.values() for name in names}
        return [
            name
            for name, places in self._places.items()
            if name not in inside and not all(isinstance(place.module, nn.Embedding) for place in places)
        ]

    def fetch(self, names: Iterable[str]) -> None:
        """Ask the disk for weights that are not here."""
        self._pages.fetch(self._tensors[name] for name in names if name not in self._open)

    def drop_copies(self) -> None:
        """Forget all copies but those of weights that another layer is yet to read."""
        self._copies = {key: copy for key, copy in self._copies.items() if self._awaited[key[0]]}

    def here(self) -> list[str]:
        """What has come in and was not let go of."""
        return [name for name in self._tensors if name in self._open]

    def finished(self) -> list[str]:
        """What is here and has been read by all the layers that have it."""
        return [name for name in self.here() if not self._awaited[name]]

    def release(self) -> None:
        """Let go of what is finished."""
        done = self.finished()
        self.drop_copies()
        self._pages.give_back(self._tensors[name] for name in done)
        self._open.difference_update(done)

    def release_all(self) -> None:
        """Let go of everything, and be dense again."""
        self._ticket = None
        self._copies.clear()
        self._pages.give_back(self._tensors[name] for name in self.here())
        self._open.clear()
        self._awaited = self._places_by_name()

    def _made(self, name: str, ticket: Mask | None) -> torch.Tensor:
        if name not in self._open:
            self.reads[name] += 1
            self._open.add(name)
        stored = self._tensors[name]
        weight = stored if ticket is None else masked_copy(stored, ticket.packed(name))
        return weight.to(self._dtypes[name])

    def _places_by_name(self) -> dict[str, set[Place]]:
        return {name: set(places) for name, places in self._places.items()}


def _read_from(
    weights: WeightsOnDemand, places: Mapping[str, list[Place]], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Have these places read their weights there; what is listed as a parameter has shape and type only."""
    attributes: dict[nn.Module, dict[str, str]] = {}
    for name, found in places.items():
        placeholder = _placeholder(parameters[name])
        for place in found:
            if isinstance(place.module, (nn.RNNBase, torch.jit.ScriptModule)):
                raise CheckpointError(
                    f"{name}: {type(place.module).__name__} reads its weights past its attributes, so they cannot "
                    "be taken from the files as it computes; load the model."
                )
            place.module._parameters[place.attribute] = placeholder
            attributes.setdefault(place.module, {})[place.attribute] = name
    for module, names in attributes.items():
        module.__class__ = _reading_class(type(module), names, weights)


def _placeholder(parameter: nn.Parameter) -> nn.Parameter:
    """One number in the parameter's shape; should a layer compute with it all the same, it shows."""
    number = torch.full((), math.nan, dtype=parameter.dtype)
    return nn.Parameter(number.expand(parameter.shape), requires_grad=False)


def _reading_class(original: type, names: Mapping[str, str], weights: WeightsOnDemand) -> type:
    """Subclass in which these parameters are read on demand."""
    namespace: dict[str, Any] = {
        attribute: property(_reader(name, attribute, weights)) for attribute, name in names.items()
    }
    namespace |= {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), namespace)


def _reader(name: str, attribute: str, weights: WeightsOnDemand) -> Any:
    def read(module: nn.Module) -> torch.Tensor:
        return weights.read(name, Place(module, attribute))

    return read
