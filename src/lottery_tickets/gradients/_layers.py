"""Layers whose weight gradient follows from their input and the gradient of their output."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_stock_layer(module: nn.Module) -> bool:
    """Whether the module computes what its class says: a subclass or a patch may use the weight otherwise."""
    return "forward" not in vars(module) and _stock_class(module) is not None


def is_convolution(module: nn.Module) -> bool:
    """Whether the layer slides a kernel."""
    return isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED))


def input_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The layer's input, however it was passed."""
    name = next(iter(inspect.signature(type(module).forward).parameters.keys() - {"self", "output_size"}))
    value = args[0] if args else kwargs[name]
    assert isinstance(value, torch.Tensor)
    return value


def add_weight_gradient(
    layer: Any, inputs: torch.Tensor, outputs: torch.Tensor, into: torch.Tensor, *, first: bool
) -> None:
    """Gradient of the layer's weight, summed over all positions of the inputs.

    Args:
        layer: A stock layer.
        inputs: What it was given, with or without a dimension of samples.
        outputs: Gradient of what it returned.
        into: In the shape of the weight, of the type to compute in.
        first: Overwrite `into`, else add to it.
    """
    if is_convolution(layer):
        gradient = _convolution_gradient(layer, inputs.to(into), outputs.to(into))
        into.copy_(gradient) if first else into.add_(gradient)
        return
    rows, columns = outputs.to(into), inputs.to(into)
    if not isinstance(layer, nn.Linear):  # transformers' Conv1D: its weight is (in, out)
        rows, columns = columns, rows
    rows, columns = rows.reshape(-1, rows.shape[-1]), columns.reshape(-1, columns.shape[-1])
    torch.addmm(into, rows.t(), columns, beta=0 if first else 1, out=into)


def _stock_class(module: nn.Module) -> type | None:
    forward = type(module).forward
    for base in type(module).__mro__:
        if "forward" not in vars(base):  # it computes as the next one does
            continue
        if base in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED) or (
            base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        ):
            return base if vars(base).get("forward") is forward else None
    return None


def _convolution_gradient(layer: Any, inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    dimensions = len(layer.kernel_size)
    if inputs.dim() == dimensions + 1:
        inputs, outputs = inputs[None], outputs[None]
    padding: Any = layer.padding
    extra = [0] * dimensions
    if isinstance(layer, _TRANSPOSED):
        # The caller of forward may have asked for another size than the layer's own output_padding gives.
        extra = [
            outputs.shape[2 + axis]
            - (inputs.shape[2 + axis] - 1) * layer.stride[axis]
            + 2 * int(layer.padding[axis])
            - int(layer.dilation[axis]) * (layer.kernel_size[axis] - 1)
            - 1
            for axis in range(dimensions)
        ]
    elif layer.padding_mode != "zeros" or isinstance(padding, str):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        padding = [0] * dimensions
    gradient: torch.Tensor = torch.ops.aten.convolution_backward(
        outputs,
        inputs,
        torch.empty((), dtype=inputs.dtype, device=inputs.device).expand(layer.weight.shape),
        None,
        layer.stride,
        padding,
        layer.dilation,
        isinstance(layer, _TRANSPOSED),
        extra,
        layer.groups,
        [False, True, False],
    )[1]
    return gradient
