"""Optimizers by name, all with one interface: a backward pass that ends with the weights updated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import MissingExtraError, TrainingError
from lottery_tickets.masks import is_sharded, local_of, zero_held
from lottery_tickets.training._after_backward import AfterBackward, Named
from lottery_tickets.training._fused_sgd import FusedSGD, check_parameters
from lottery_tickets.training._parts import first_place, own_states, whole_states
from lottery_tickets.training._passes import Clip, Passes
from lottery_tickets.training._rounding import key_of
from lottery_tickets.training._weights import (
    Precision,
    blocks,
    check_precision,
    is_half,
    widened,
    write,
)

# Bytes of a network whose gradients may as well wait for each other.
_SMALL = 4 << 20

MakeOptimizer = Callable[..., torch.optim.Optimizer]


class Stepper(Protocol):
    """What a training loop asks of an optimizer.

    Attributes:
        optimizer: The torch optimizer, for learning-rate schedulers.
        param_groups: Its groups.
        nonfinite: Names of the parameters whose gradient was infinite or NaN in the latest update.
        moved: How many parameters the latest update has changed so far; 0 after an error means that the step can
            be made again.
    """

    @property
    def optimizer(self) -> torch.optim.Optimizer: ...
    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    @property
    def nonfinite(self) -> tuple[str, ...]: ...
    @property
    def moved(self) -> int: ...

    def backward(self, loss: torch.Tensor) -> None:
        """Go back from the loss and update, accumulated gradients included; none is left afterwards."""

    def accumulate(self, loss: torch.Tensor) -> None:
        """Go back from a micro-batch's loss and hold its gradients until `backward`."""

    def scale_accumulated(self, factor: float) -> None:
        """Multiply the gradients that are held, where the whole batch weighs other than was thought."""

    def zero_grad(self) -> None:
        """Drop gradients, accumulated ones too."""

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on beside the weights."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""


def make_optimizer(
    kind: str | MakeOptimizer,
    named_parameters: Named,
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_grad_norm: float | None = None,
    clip: Clip | None = None,
    precision: Precision = "stochastic",
    seed: int = 0,
    ranks: Ranks | None = None,
) -> Stepper:
    """An optimizer by name, updating inside the backward pass where it is one of these names.

    Args:
        kind: "sgd" (`FusedSGD`); "adam" and "adamw" (torch's fused); "adamw8bit" (torchao's, whose states take two
            bytes a weight); or a function that makes a torch optimizer, `kind(named_parameters, lr=lr)`, which
            then steps after the backward pass.
        named_parameters: Name and parameter; those that do not require gradients are left out.
        lr: Learning rate.
        momentum: Of "sgd" only.
        weight_decay: In the gradient for "sgd" and "adam", decoupled for AdamW; a function has its own.
        max_grad_norm: Gradients are scaled down to this norm; None for no clipping.
        clip: "tensor" or "global", as `FusedSGD` has it; by default "tensor" for the names and "global" for a
            function, which knows no other.
        precision: Of weights in bfloat16 and float16, as `FusedSGD` has it; a function's are rounded as it does.
        seed: Of stochastic rounding.
        ranks: Processes that update by the sums of their gradients; see `FusedSGD`.

    Returns:
        Anything with the methods of `Stepper`.

    Raises:
        TrainingError: An unknown name or an option that does not go with it.
        MissingExtraError: "adamw8bit" without torchao.

    Example:
        >>> import torch
        >>> from lottery_tickets.training import make_optimizer
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = make_optimizer("adamw", model.named_parameters(), lr=0.01)
        >>> optimizer.backward(model(torch.ones(1, 2)).square().sum())
        >>> optimizer.moved, optimizer.nonfinite
        (2, ())
    """
    named = [(name, one) for name, one in named_parameters if one.requires_grad]
    if kind != "sgd" and momentum:
        raise TrainingError(f"momentum={momentum} is for 'sgd'; Adam has its betas, a function its own arguments.")
    if kind == "sgd":
        return FusedSGD(
            named, lr, momentum, weight_decay,
            max_grad_norm=max_grad_norm, clip=clip or "tensor", precision=precision, seed=seed, ranks=ranks,
        )  # fmt: skip
    if callable(kind):
        if clip == "tensor" or weight_decay:
            raise TrainingError(
                "A function sets its own weight_decay, and clip='tensor' is for the optimizers by name."
            )
        return AfterBackward(named, kind(named, lr=lr), max_grad_norm=max_grad_norm, ranks=ranks)
    if kind not in _ADAMS:
        raise TrainingError(f"optimizer is one of sgd, {', '.join(_ADAMS)} or a function; got {kind!r}.")

    def make(parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return _ADAMS[kind](parameters, lr=lr, weight_decay=weight_decay)

    return InBackward(
        *(named, make),
        max_grad_norm=max_grad_norm,
        clip=clip or "tensor",
        precision=precision,
        seed=seed,
        ranks=ranks,
    )


class InBackward:
    """A torch optimizer that steps each parameter inside the backward pass and frees its gradient at once.

    Its `step()` must pass over parameters without a gradient, as torch's AdamW does: it is called when only one
    has one. A network of a few megabytes is stepped once, after the pass: that costs no memory worth the time of
    many calls, and gives the same bits. Weights in bfloat16 and float16 are lent to it in float32, a parameter at
    a time, and rounded on their way back; its states are in float32 therefore.

    Args:
        named: Name and parameter.
        make: Makes the optimizer from such pairs.
        max_grad_norm: See `FusedSGD`.
        clip: See `FusedSGD`.
        precision: See `FusedSGD`.
        seed: See `FusedSGD`.
        ranks: See `FusedSGD`.
    """

    def __init__(
        self,
        named: Named,
        make: Callable[[list[tuple[str, nn.Parameter]]], torch.optim.Optimizer],
        *,
        max_grad_norm: float | None,
        clip: Clip,
        precision: Precision,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        check_precision(precision)
        self._named = list(named)
        check_parameters(self._named)
        self._lent = [_lent(one) for _, one in self._named]
        names = [name for name, _ in self._named]
        self.optimizer = make(list(zip(names, self._lent, strict=True)))
        self._lost: dict[int, torch.Tensor] = {}
        self._starts = [first_place(name, one) for name, one in self._named]
        self._precision: Precision = precision
        self._seed, self._steps = seed, 0
        size = sum(one.numel() * one.element_size() for _, one in self._named)
        self._together = size <= _SMALL and not any(is_half(one) for _, one in self._named)
        self._passes = Passes(
            self._named,
            self._update,
            max_grad_norm=max_grad_norm,
            clip=clip,
            finish=self._step_together if self._together else None,
            ranks=ranks,
        )

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters whose gradient was infinite or NaN in the latest update; they did not move."""
        return self._passes.nonfinite

    @property
    def moved(self) -> int:
        """How many parameters the latest update has changed so far."""
        return self._passes.moved

    def backward(self, loss: torch.Tensor) -> None:
        """Go back from the loss and update every parameter, accumulated gradients included."""
        self._passes.backward(loss)
        self._steps += 1

    def accumulate(self, loss: torch.Tensor) -> None:
        """Go back from the loss of a micro-batch and hold its gradients, in float32 at least, until `backward`."""
        self._passes.accumulate(loss)

    def scale_accumulated(self, factor: float) -> None:
        """Multiply the gradients that are held, where the whole batch weighs other than was thought."""
        self._passes.scale(factor)

    def zero_grad(self) -> None:
        """Drop gradients, accumulated ones too."""
        self._passes.forget()
        for _, one in self._named:
            one.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, with what rounding lost, the steps made and the seed.

        Tensors are plain ones: of a state in 8 bits its codes, its scales and the map between them. Those of
        parameters in parts (DTensors) are DTensors.

        Raises:
            TrainingError: Gradients are accumulated and not yet used, or a state in 8 bits is one of a part.
        """
        if self._passes.holds_gradients:
            raise TrainingError(
                "State is saved between steps, but gradients are accumulated: call backward first."
            )
        inner = self.optimizer.state_dict()
        states = {
            index: {name: _plain(value) for name, value in state.items()}
            for index, state in inner["state"].items()
        }
        lost = {index: {"lost": one} for index, one in self._lost.items()}
        return {
            "optimizer": {**inner, "state": whole_states(states, self._named)},
            "lost": {index: one["lost"] for index, one in whole_states(lost, self._named).items()},
            "steps": self._steps,
            "seed": self._seed,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave, which is copied."""
        inner = state_dict["optimizer"]
        states = {
            index: {name: _packed(name, value) for name, value in state.items()}
            for index, state in own_states(inner["state"], self._named).items()
        }
        self.optimizer.load_state_dict({**inner, "state": states})
        lost = {index: {"lost": one} for index, one in state_dict["lost"].items()}
        self._lost = {index: one["lost"] for index, one in own_states(lost, self._named).items()}
        self._steps, self._seed = state_dict["steps"], state_dict["seed"]

    def _update(self, index: int, gradient: torch.Tensor, coefficient: float | None) -> None:
        weights, lent = local_of(self._named[index][1].detach()), self._lent[index]
        if is_half(weights):
            if self._precision == "compensated" and index not in self._lost:
                self._lost[index] = torch.zeros_like(weights)
            lent.data = widened(weights, self._lost.get(index))
            gradient = gradient.float()
        lent.grad = gradient if coefficient is None else gradient * coefficient
        if self._together:
            return
        self.optimizer.step()
        lent.grad = None
        if is_half(weights):
            self._take_back(index, weights, lent.data)
            lent.data = _nothing(weights)
        self._hold(index)

    def _step_together(self) -> None:
        stepped = [index for index, one in enumerate(self._lent) if one.grad is not None]
        try:
            self.optimizer.step()
        finally:
            for one in self._lent:
                one.grad = None
        for index in stepped:
            self._hold(index)

    def _hold(self, index: int) -> None:
        """Zero what a ticket in training has pruned, if it cannot see that another tensor was stepped for it."""
        lent, parameter = self._lent[index], self._named[index][1]
        if lent is parameter:
            return
        state = {**self.optimizer.state[lent], "lost": self._lost.get(index)}
        zero_held(
            parameter,
            *(one for key, one in state.items() if key != "step" and type(one) is torch.Tensor),
        )

    def _take_back(self, index: int, weights: torch.Tensor, wide: torch.Tensor) -> None:
        key, lost = key_of(self._seed, self._steps, index, 0), self._lost.get(index)
        for block in blocks(wide, weights, *([] if lost is None else [lost])):
            values, own, *rest = block.parts
            start = self._starts[index] + block.start
            write(values, own, rest[0] if rest else None, precision=self._precision, key=key, start=start)


def _lent(one: nn.Parameter) -> nn.Parameter:
    """What the optimizer steps in a parameter's place."""
    if is_half(one):
        return nn.Parameter(_nothing(one))
    return nn.Parameter(local_of(one.detach())) if is_sharded(one) else one


def _nothing(like: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.float32, device=like.device)


def _plain(value: Any) -> Any:
    """A torchao state as a dict of plain tensors; anything else as it is."""
    if not isinstance(value, torch.Tensor) or not hasattr(value, "__tensor_flatten__"):
        return value
    return {part: getattr(value, part) for part in value.__tensor_flatten__()[0]}


def _packed(name: str, value: Any) -> Any:
    """What `_plain` took apart."""
    if not isinstance(value, dict):
        return value
    from torchao.optim.subclass_8bit import OptimState8bit

    return OptimState8bit(**value, signed=name == "exp_avg", dtype=torch.float32)


def _adamw8bit(parameters: list[tuple[str, nn.Parameter]], *, lr: float, weight_decay: float) -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise MissingExtraError("torchao", "lean") from error
    return AdamW8bit(parameters, lr=lr, weight_decay=weight_decay)


def _fused(make: MakeOptimizer) -> MakeOptimizer:
    """In one pass over the weights and without temporaries, where torch has that."""

    def made(parameters: list[tuple[str, nn.Parameter]], **options: float) -> torch.optim.Optimizer:
        fused = all(one.device.type in _FUSING for _, one in parameters)
        return make(parameters, **options, fused=fused or None)

    return made


_FUSING = ("cpu", "cuda", "mps", "xpu")
_ADAMS: dict[str, MakeOptimizer] = {
    "adam": _fused(torch.optim.Adam),
    "adamw": _fused(torch.optim.AdamW),
    "adamw8bit": _adamw8bit,
}
