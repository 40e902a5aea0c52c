"""Weight gradients of single samples, made inside the backward pass and handed on at once.

A tap sits behind each call of a layer. It keeps the layer's input, as autograd would for the weight's gradient,
and when the gradient of the output comes by, both give one matrix product for each sample. The weight itself does
not require gradients, so autograd makes none of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from lottery_tickets.gradients._layers import add_weight_gradient, input_of


class Receiver(Protocol):
    """Takes gradients as a backward pass makes them, parameter by parameter."""

    def receive(self, name: str, sample: int, gradient: torch.Tensor) -> None:
        """A parameter's gradient of one sample, by its position in the batch.

        It is float32, in the shape of the weight, in memory that the next call overwrites.
        """

    def finished(self, name: str) -> None:
        """The parameter's gradients in this pass, if there were any, have all been handed on."""


class MisfitError(Exception):
    """A layer whose input does not hold one sample in each row of its first dimension."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class _Use(NamedTuple):
    """One call of a layer, seen from the backward pass."""

    layer: nn.Module
    inputs: torch.Tensor
    outputs: torch.Tensor  # their gradient


class Taps:
    """Taps on the layers that hold some parameters.

    Args:
        layers: Parameter name to the layers that hold it as their weight.
    """

    def __init__(self, layers: Mapping[str, Iterable[nn.Module]]) -> None:
        self.anchor = torch.zeros((), requires_grad=True)
        self._layers = layers
        self._receiver: Receiver | None = None
        self._misfit: str | None = None
        self._rows: int | None = None  # samples of the batch, None where all of it is taken for one
        self._wanted: list[int] = []
        self._calls: Counter[str] = Counter()
        self._uses: dict[str, list[_Use]] = {}
        self._counting = False
        self._scratch: dict[torch.device, torch.Tensor] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks on the layers for the time of the block."""
        handles = [
            layer.register_forward_hook(self._hook(name), with_kwargs=True, prepend=True)
            for name, layers in self._layers.items()
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def forward(self, rows: int | None) -> Iterator[None]:
        """A forward pass over a batch of so many rows (None: all of it as one), whose calls are counted.

        Raises:
            MisfitError: At the end, since the pass may be one of several ranks.
        """
        self._calls.clear()
        self._rows, self._counting, self._misfit = rows, True, None
        try:
            yield
        finally:
            self._counting = False  # a checkpoint calls the layers again in the backward pass
        if self._misfit is not None:
            raise MisfitError(self._misfit)

    @contextmanager
    def backward(self, wanted: list[int], receiver: Receiver) -> Iterator[None]:
        """A backward pass: gradients of the wanted samples go to the receiver."""
        self._uses = {}
        self._wanted, self._receiver = wanted, receiver
        try:
            yield
            # Calls whose output the loss does not depend on never came back.
            for name in list(self._uses):
                self._hand_on(name)
        finally:
            self._uses, self._receiver = {}, None

    def _hook(self, name: str) -> Callable[..., torch.Tensor | None]:
        def tap(layer: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            inputs = input_of(layer, args, kwargs).detach()
            if self._counting:
                if self._rows is not None and self._rows > 1 and inputs.shape[0] != self._rows:
                    self._misfit = name
                    return None
                self._calls[name] += 1

            def come_back(kept: torch.Tensor, gradient: torch.Tensor) -> None:
                self._collect(name, _Use(layer, kept, gradient))

            tapped: torch.Tensor = _Tap.apply(output, inputs, self.anchor, come_back)  # type: ignore[no-untyped-call]
            return tapped

        return tap

    def _collect(self, name: str, use: _Use) -> None:
        uses = self._uses.setdefault(name, [])
        uses.append(use)
        if len(uses) == self._calls[name]:
            self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        """The sum over all uses before anything is done with it: the square of a sum is no sum of squares."""
        uses = [self._widened(use) for use in self._uses.pop(name)]
        weight, receiver = uses[0].layer.weight, self._receiver
        assert isinstance(weight, torch.Tensor)
        assert receiver is not None, "a gradient outside a backward pass"
        gradient = self._buffer(weight)
        for sample in self._wanted:
            rows = slice(sample, sample + 1) if self._rows is not None and self._rows > 1 else slice(None)
            for turn, (layer, inputs, outputs) in enumerate(uses):
                add_weight_gradient(layer, inputs[rows], outputs[rows], gradient, first=not turn)
            receiver.receive(name, sample, gradient)
        receiver.finished(name)

    @staticmethod
    def _widened(use: _Use) -> _Use:
        return _Use(use.layer, use.inputs.float(), use.outputs.float())

    def _buffer(self, weight: torch.Tensor) -> torch.Tensor:
        scratch = self._scratch.get(weight.device)
        if scratch is None or scratch.numel() < weight.numel():
            scratch = torch.empty(weight.numel(), dtype=torch.float32, device=weight.device)
            self._scratch[weight.device] = scratch
        return scratch[: weight.numel()].view(weight.shape)


class _Tap(torch.autograd.Function):
    """The identity, in place; its backward pass shows the gradient to whoever holds the input."""

    @staticmethod
    def forward(
        ctx: Any,
        output: torch.Tensor,
        inputs: torch.Tensor,
        anchor: torch.Tensor,
        come_back: Callable[[torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        # Saved so that activation checkpoints and autograd's version check see it as one of their own.
        ctx.save_for_backward(inputs)
        ctx.come_back = come_back
        # In place, because what follows may itself write in place (nn.ReLU(inplace=True)).
        ctx.mark_dirty(output)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (inputs,) = ctx.saved_tensors
        ctx.come_back(inputs, gradient)
        return gradient, None, None, None
