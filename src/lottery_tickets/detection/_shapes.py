"""Probes look at the same tensors at every check."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lottery_tickets.errors import WeightsError
from lottery_tickets.masks import local_of
from lottery_tickets.sparsity import rankable

Shapes = dict[str, torch.Size]


def shapes_of(tensors: Mapping[str, torch.Tensor]) -> Shapes:
    """Shapes by name, whole where they lie in parts, of tensors that have magnitudes to rank.

    Raises:
        WeightsError: One that has none.
    """
    rankable({name: local_of(tensor) for name, tensor in tensors.items()})
    return {name: tensor.shape for name, tensor in tensors.items()}


def checked(tensors: Mapping[str, torch.Tensor], shapes: Shapes) -> dict[str, torch.Tensor]:
    """The tensors without their gradients, in the order of `shapes`.

    Raises:
        WeightsError: Other names or shapes than these.
    """
    found = shapes_of(tensors)
    if found != shapes:
        strange = sorted(name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name))
        raise WeightsError(
            "A check looks at the same tensors as the checks before it; these have appeared, gone or changed "
            f"their shape: {', '.join(strange)}. Start anew for another model."
        )
    return {name: tensors[name].detach() for name in shapes}
