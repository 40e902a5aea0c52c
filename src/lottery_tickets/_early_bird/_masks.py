"""A mask as what a run's state can hold, and back."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from lottery_tickets.masks import Mask


def mask_state(mask: Mask) -> dict[str, Any]:
    """Shapes as lists, and packed bits as tensors that share the mask's memory and must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the memory is read-only; it is only read
        bits = {name: torch.from_numpy(mask.packed(name)) for name in mask.names}
    return {"shapes": {name: list(shape) for name, shape in mask.shapes.items()}, "bits": bits}


def mask_from(state: dict[str, Any]) -> Mask:
    """The mask that `mask_state` was given."""
    bits = {name: packed.numpy() for name, packed in state["bits"].items()}
    return Mask.from_packed(bits, {name: torch.Size(shape) for name, shape in state["shapes"].items()})
