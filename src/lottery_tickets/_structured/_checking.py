"""Whether a smaller network computes what the masked one does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lottery_tickets._batches import evaluating
from lottery_tickets._structured._inputs import Arguments
from lottery_tickets.errors import StructureError
from lottery_tickets.masks import applied

# Sums of fewer terms are rounded otherwise; what is wired wrongly is off by its own size.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}


def check_equal(model: nn.Module, smaller: nn.Module, mask: Mapping[str, torch.Tensor], inputs: Arguments) -> None:
    """Run both on the same inputs, in evaluation mode.

    Raises:
        StructureError: Outputs that differ by more than rounding.
    """
    args, kwargs = inputs
    with evaluating(model), evaluating(smaller):
        with applied(model, mask):
            expected = list(tensors_in(model(*args, **kwargs)))
        try:
            found = list(tensors_in(smaller(*args, **kwargs)))
        except (RuntimeError, IndexError, ValueError) as error:
            raise StructureError(_unequal(model, f"it fails: {str(error).splitlines()[0]}")) from error
    apart = relative_error(expected, found)
    if apart is None or not apart <= _TOLERANCE.get(_dtype(expected), 0.1):
        what = "outputs of other shapes" if apart is None else f"outputs off by {apart:.2g} of the largest"
        raise StructureError(_unequal(model, f"it gives {what}"))


def relative_error(expected: list[torch.Tensor], found: list[torch.Tensor]) -> float | None:
    """The largest difference over the largest value; None for other shapes."""
    if [one.shape for one in expected] != [one.shape for one in found]:
        return None
    error = 0.0
    for one, other in zip(expected, found, strict=True):
        if one.is_floating_point() and one.numel():
            largest = float(one.detach().double().abs().max())
            difference = float((one.double() - other.double()).detach().abs().max())
            error = max(error, difference / largest if largest else difference)
    return error


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    """The tensors of what a model returns."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for one in output.values():
            yield from tensors_in(one)
    elif isinstance(output, (tuple, list)):
        for one in output:
            yield from tensors_in(one)


def _dtype(tensors: list[torch.Tensor]) -> torch.dtype:
    return next((one.dtype for one in tensors if one.is_floating_point()), torch.float32)


def _unequal(model: nn.Module, what: str) -> str:
    return (
        f"{type(model).__name__} without the units does not compute what it does with them masked: {what}. Its "
        "code may have sizes written into it; let it take them from its layers."
    )
