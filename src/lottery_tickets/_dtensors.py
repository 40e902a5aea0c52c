"""Tensors of which every process of a job holds a part, as far as can be told without importing them."""

from __future__ import annotations

import sys

import torch


def is_sharded(tensor: object) -> bool:
    """Whether this is a DTensor."""
    # Where nobody has imported DTensors there are none, and importing them takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: the same memory, without its gradient; of a plain one all."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return local
