"""A network made linear and positive, and what flows through each of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients._layers import add_weight_gradient, is_stock_layer

Receive = Callable[[str, torch.Tensor], None]
Strength = Callable[[str], torch.Tensor]

_ELEMENTWISE = (
    *(
        "relu",
        "relu_",
        "relu6",
        "leaky_relu",
        "leaky_relu_",
        "elu",
        "elu_",
        "selu",
        "selu_",
        "celu",
        "celu_",
        "gelu",
    ),
    *("silu", "mish", "hardtanh", "hardtanh_", "hardswish", "hardsigmoid", "softplus", "softsign", "logsigmoid"),
    *("tanh", "tanh_", "sigmoid", "sigmoid_", "rrelu", "log_softmax", "tanhshrink"),
)
_PRODUCTS = ("mul", "mul_", "multiply", "__mul__", "__rmul__", "__imul__")
_OPAQUE = (nn.MultiheadAttention, nn.RNNBase)


@contextmanager
def linearised(
    model: nn.Module, layers: Mapping[nn.Module, str | None], strength: Strength, receive: Receive
) -> Iterator[None]:
    """Let the model compute its flow for the time of the block; see `compute_synflow_importance`.

    Args:
        model: In evaluation mode.
        layers: Every stock layer of the model, and the name of its weight if it is scored.
        strength: Weight's name to |w|, float64, with zeros where it is removed.
        receive: Called in the backward pass with a weight's name and the output's derivative by its strength.
    """
    for name, module in model.named_modules():
        if isinstance(module, _OPAQUE):
            raise ScoreError(
                f"{name} is a {type(module).__name__}, which computes in one piece: no flow is known."
            )
    with ExitStack() as stack:
        for module in model.modules():
            forward = _forward_of(module, layers, strength, receive)
            if forward is not None:
                stack.enter_context(_replaced(module, forward))
        stack.enter_context(_Linear())
        yield


def _forward_of(
    module: Any, layers: Mapping[nn.Module, str | None], strength: Strength, receive: Receive
) -> Callable[..., Any] | None:
    if module in layers:
        name = layers[module]

        def through(input: torch.Tensor, *rest: Any) -> Any:
            weight = (lambda: strength(name)) if name else (lambda: module.weight.detach().double().abs())
            gone = (lambda gradient: receive(name, gradient)) if name else None
            return _Flow.apply(input.double(), module, rest, weight, gone)  # type: ignore[no-untyped-call]

        return through
    if isinstance(module, nn.Embedding):
        return lambda input: torch.ones(
            *input.shape, module.embedding_dim, dtype=torch.float64, device=input.device, requires_grad=True
        )
    if type(module).__module__ == "transformers.activations":  # some are formulas of several operations
        return lambda input: input
    if "Norm" in type(module).__name__ and not list(module.children()):
        return lambda input, *_: _normalised(module, input.double())
    return None


def _normalised(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """The norm's division by a number held constant, and its scale; no shift."""
    variance, scale = getattr(norm, "running_var", None), getattr(norm, "weight", None)
    channels = isinstance(norm, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    shape = (1, -1, *[1] * (x.dim() - 2)) if channels else (-1,)
    if variance is not None:
        x = x / (variance.double() + norm.eps).sqrt().view(shape)
    else:
        x = x / x.detach().square().mean().sqrt()
    return x if scale is None else x * scale.detach().double().abs().view(shape)


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class _Flow(torch.autograd.Function):
    """A layer without its bias, whose weight is made anew in both directions, so that no copy of all is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: nn.Module,
        rest: Any,
        weight: Callable[[], torch.Tensor],
        gone: Callable[[torch.Tensor], None] | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer, ctx.rest, ctx.weight, ctx.gone = layer, rest, weight, gone
        return _applied(layer, x, weight(), rest)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, above: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        weight = ctx.weight()
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (below,) = torch.autograd.grad(_applied(ctx.layer, leaf, weight, ctx.rest), leaf, above)
        if ctx.gone is not None:
            add_weight_gradient(ctx.layer, x, above, weight, first=True)
            ctx.gone(weight)
        return below, None, None, None, None


def _applied(layer: Any, x: torch.Tensor, weight: torch.Tensor, rest: Any) -> torch.Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    if isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        dimensions = len(layer.kernel_size)
        transpose, sized = getattr(F, f"conv_transpose{dimensions}d"), cast("Any", layer)
        padding = sized._output_padding(
            x,
            rest[0] if rest else None,
            layer.stride,
            layer.padding,
            layer.kernel_size,
            dimensions,
            layer.dilation,
        )
        out: torch.Tensor = transpose(
            x, weight, None, layer.stride, layer.padding, padding, layer.groups, layer.dilation
        )
        return out
    if hasattr(layer, "_conv_forward"):
        convolved: torch.Tensor = layer._conv_forward(x, weight, None)
        return convolved
    return x @ weight  # transformers' Conv1D


class _Linear(TorchFunctionMode):
    """Functions of activations in their linear form."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ELEMENTWISE and _flows(args[0]):
            return args[0]
        if name == "softmax" and _flows(args[0]):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
            return _factor(args[0]) / args[0].shape[dim]
        if name in _PRODUCTS and _flows(args[0]) and _flows(args[1]):
            a, b = args[0], args[1]
            return (a.detach() * b.detach()).sqrt() * _factor(a) * _factor(b)
        if name == "scaled_dot_product_attention":
            return _attention(*args[:3]) if len(args) > 2 else _attention(**{k: kwargs[k] for k in _ROLES})
        return func(*args, **kwargs)


_ROLES = ("query", "key", "value")


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Of positions that are alike: the mean of the values, times a factor for queries and keys."""
    groups = query.shape[-3] // key.shape[-3]
    key, value = (one.repeat_interleave(groups, -3) if groups > 1 else one for one in (key, value))
    scores = query @ key.transpose(-1, -2)
    return (_factor(scores) / scores.shape[-1]) @ value


def _flows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _factor(x: torch.Tensor) -> torch.Tensor:
    """One, with the relative change of x for its derivative; zero where x is."""
    constant = x.detach()
    return torch.where(constant == 0, torch.zeros_like(x), x / constant.masked_fill(constant == 0, 1))


def stock_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose flow is known."""
    return [module for module in model.modules() if is_stock_layer(module)]
