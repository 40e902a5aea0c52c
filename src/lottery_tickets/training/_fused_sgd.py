"""Stochastic gradient descent whose step runs inside the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import is_sharded, local_of
from lottery_tickets.training._parts import first_place, own_states, whole_states
from lottery_tickets.training._passes import Clip, Passes
from lottery_tickets.training._rounding import key_of
from lottery_tickets.training._weights import Precision, blocks, check_precision, is_half, widened, write

_WEIGHTS, _MOMENTUM = 0, 1  # streams of noise


class FusedSGD(torch.optim.Optimizer):
    r"""SGD that updates each parameter during the backward pass and frees its gradient at once.

    $$v \leftarrow \mu v + (g + \lambda w), \qquad w \leftarrow w - \eta v$$

    There is never more than one parameter's gradient (and what autograd has on the way), so training takes the
    weights, the activations and little else. Weights in float32 and float64 come out bit for bit as with
    `torch.optim.SGD`. Those in bfloat16 and float16 are updated in float32, in blocks, and rounded as `precision`
    says, since a step below half their spacing would otherwise be lost.

    `backward(loss)` takes the place of `loss.backward(); optimizer.step()`. Hooks are there only while it runs, so
    other backward passes over the same parameters do what they always do. `step()` updates from gradients that are
    there already: those that `accumulate` holds and those in `.grad`. After `backward` there are none, so a
    `step()` that a scheduler or a loop expects changes nothing. `zero_grad()` drops both kinds.

    A gradient with an infinite or NaN element moves nothing: its parameter, momentum included, stays as it was,
    and `nonfinite` names it. With `clip="global"` no parameter moves then. After an error in the middle of a pass
    `moved` tells how many parameters had been updated; gradients and accumulators are gone.

    Args:
        params: Parameters, (name, parameter) pairs, or groups of them with options of their own, as torch has it.
        lr: $\eta$; a group's "lr" may be changed by torch's schedulers.
        momentum: $\mu$; if not 0 a buffer takes the weights' bytes again, in their data type. In bfloat16 and
            float16 it is rounded stochastically, but with precision "nearest".
        weight_decay: $\lambda$.
        max_grad_norm: Gradients are scaled down to this norm; None for no clipping.
        clip: "tensor" clips each parameter's gradient by its own norm. "global" clips exactly as
            `torch.nn.utils.clip_grad_norm_`, for a second backward pass over the kept graph.
        precision: Of weights in bfloat16 and float16: "stochastic" rounds up or down by chance, right on average;
            "compensated" keeps what rounding lost in a buffer that takes the weights' bytes again; "nearest" loses
            small steps. Other data types ignore it.
        seed: Of stochastic rounding. Its bits depend on (seed, step, parameter, element) alone.
        ranks: Processes with the same weights, each of which goes back from a share of the loss: `backward`
            updates by the sums of their gradients, each of which is added up as soon as it is there; None for this
            process alone.

    Attributes:
        nonfinite: Names of the parameters with a non-finite gradient in the latest update.
        moved: How many parameters the latest update has changed so far.

    Raises:
        TrainingError: An option out of range; parameters that share memory or are not plain tensors of floats.

    Example:
        >>> import torch
        >>> from lottery_tickets.training import FusedSGD
        >>> model = torch.nn.Linear(2, 1)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> optimizer = FusedSGD(model.named_parameters(), lr=0.25)
        >>> optimizer.backward(model(torch.ones(1, 2)).sum())
        >>> model.weight.tolist(), model.weight.grad
        ([[0.75, 0.75]], None)

    References:
        Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources", ACL 2024,
        arXiv 2306.09782, section 3.1 (the fused step) and 3.3 (clipping). Zamirai et al., "Revisiting BFloat16
        Training", arXiv 2010.06192, section 4 (stochastic rounding and Kahan summation of weight updates).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        *,
        max_grad_norm: float | None = None,
        clip: Clip = "tensor",
        precision: Precision = "stochastic",
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        check_precision(precision)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._precision: Precision = precision
        self._seed, self._steps = seed, 0
        self._named = named_parameters_of(self.param_groups)
        check_parameters(self._named)
        self._places = [(group, one) for group in self.param_groups for one in group["params"]]
        self._starts = [first_place(name, one) for name, one in self._named]
        self._passes = Passes(self._named, self._update, max_grad_norm=max_grad_norm, clip=clip, ranks=ranks)

    @property
    def optimizer(self) -> FusedSGD:
        """Itself: where a training loop keeps the torch optimizer of any kind."""
        return self

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters whose gradient was infinite or NaN in the latest update; they did not move."""
        return self._passes.nonfinite

    @property
    def moved(self) -> int:
        """How many parameters the latest update has changed so far."""
        return self._passes.moved

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch has it, before the first step: the passes know the parameters they were made for."""
        if hasattr(self, "_passes"):
            raise TrainingError("Give FusedSGD all its parameters when it is made; a group cannot be added later.")
        super().add_param_group(param_group)
        for name in ("lr", "momentum", "weight_decay"):
            if not self.param_groups[-1][name] >= 0:
                raise TrainingError(f"{name} is a number >= 0, got {self.param_groups[-1][name]}.")

    def backward(self, loss: torch.Tensor) -> None:
        """Go back from the loss and update every parameter on the way, accumulated gradients included.

        Raises:
            TrainingError: A loss without a graph, gradients left over in `.grad`, a sparse gradient, or one that
                comes in parts.
        """
        self._passes.backward(loss)
        self._steps += 1
        self.step()

    def accumulate(self, loss: torch.Tensor) -> None:
        """Go back from the loss of a micro-batch and hold its gradients for the update that `backward` makes.

        They are held in float32 at least: 4 bytes a trainable weight until then. Losses add up, so that of a
        micro-batch is weighted by its share of the whole batch.
        """
        self._passes.accumulate(loss)

    def scale_accumulated(self, factor: float) -> None:
        """Multiply the gradients that are held, where the whole batch weighs other than was thought."""
        self._passes.scale(factor)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update from gradients that are there already: accumulated ones and `.grad`, which is freed."""
        if closure is not None:
            raise TrainingError("FusedSGD takes no closure; it would need the gradients it does not keep.")
        gradients = {
            index: local_of(one.grad) for index, (_, one) in enumerate(self._places) if one.grad is not None
        }
        if gradients or self._passes.holds_gradients:
            for _, one in self._places:
                one.grad = None
            self._passes.use(gradients)
            self._steps += 1
        return None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop gradients, accumulated ones too; nothing is ever kept as zeros."""
        super().zero_grad(set_to_none=True)
        self._passes.forget()

    def state_dict(self) -> dict[str, Any]:
        """All that the next steps depend on beside the weights: buffers, options, steps made, and the seed.

        Of parameters in parts (DTensors) the buffers are DTensors too.

        Raises:
            TrainingError: Gradients are accumulated and not yet used.
        """
        if self._passes.holds_gradients:
            raise TrainingError(
                "State is saved between steps, but gradients are accumulated: call backward or step."
            )
        inner = super().state_dict()
        states = whole_states(inner["state"], self._named)
        return {**inner, "state": states, "steps": self._steps, "seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave, which is copied."""
        super().load_state_dict({**state_dict, "state": own_states(state_dict["state"], self._named)})
        self._steps, self._seed = state_dict["steps"], state_dict["seed"]
        # Groups are new objects now.
        self._places = [(group, one) for group in self.param_groups for one in group["params"]]

    def _update(self, index: int, gradient: torch.Tensor, coefficient: float | None) -> None:
        group, parameter = self._places[index]
        weights = local_of(
            parameter.detach()
        )  # shares memory and version: autograd notices a change under its feet
        if is_half(weights):
            self._update_half(index, group, parameter, weights, gradient, coefficient)
        else:
            self._update_plain(group, parameter, weights, gradient, coefficient)

    def _update_plain(
        self,
        group: dict[str, Any],
        parameter: nn.Parameter,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        coefficient: float | None,
    ) -> None:
        """The operations of `torch.optim.SGD` in its order, on blocks, without writing to the gradient."""
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        fresh = momentum != 0 and "momentum_buffer" not in self.state[parameter]
        if momentum == 0:
            velocity = weights  # a stand-in, not used
        elif fresh:
            velocity = self.state[parameter]["momentum_buffer"] = torch.empty_like(weights)
        else:
            velocity = self.state[parameter]["momentum_buffer"]
        for block in blocks(weights, gradient, velocity):
            own, change, speed = block.parts
            if coefficient is not None:
                change = change * coefficient
            if decay != 0:
                change = change.add(own, alpha=decay)
            if momentum != 0:
                change = speed.copy_(change) if fresh else speed.mul_(momentum).add_(change)
            own.add_(change, alpha=-lr)

    def _update_half(
        self,
        index: int,
        group: dict[str, Any],
        parameter: nn.Parameter,
        weights: torch.Tensor,
        gradient: torch.Tensor,
        coefficient: float | None,
    ) -> None:
        """The same in float32, each block rounded on its way back."""
        lr, momentum, decay = float(group["lr"]), group["momentum"], group["weight_decay"]
        state = self.state[parameter]
        if momentum != 0 and "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(weights)
        if self._precision == "compensated" and "compensation" not in state:
            state["compensation"] = torch.zeros_like(weights)
        velocity, lost = state.get("momentum_buffer", weights), state.get("compensation", weights)
        rounding: Precision = "nearest" if self._precision == "nearest" else "stochastic"
        keys = [key_of(self._seed, self._steps, index, stream) for stream in (_WEIGHTS, _MOMENTUM)]
        for block in blocks(weights, gradient, velocity, lost):
            own, change, speed, rest = block.parts
            start = self._starts[index] + block.start
            kept = rest if self._precision == "compensated" else None
            wide, change = widened(own, kept), widened(change, None)
            if coefficient is not None:
                change.mul_(coefficient)
            if decay != 0:
                change.add_(wide, alpha=decay)
            if momentum != 0:
                change.add_(speed.float(), alpha=momentum)
                write(change, speed, None, precision=rounding, key=keys[_MOMENTUM], start=start)
            wide.add_(change, alpha=-lr)
            write(wide, own, kept, precision=self._precision, key=keys[_WEIGHTS], start=start)


def named_parameters_of(groups: list[dict[str, Any]]) -> list[tuple[str, nn.Parameter]]:
    """Names as they were given, else positions, and the parameters of an optimizer's groups."""
    parameters = [one for group in groups for one in group["params"]]
    names = [name for group in groups for name in group.get("param_names", [None] * len(group["params"]))]
    return [
        (f"parameter {index}" if name is None else name, one)
        for index, (name, one) in enumerate(zip(names, parameters, strict=True))
    ]


def check_parameters(named: list[tuple[str, nn.Parameter]]) -> None:
    """Raise TrainingError for parameters that cannot be updated one by one."""
    extents = []
    for name, one in named:
        if is_sharded(one):  # its parts have memory of their own
            continue
        if type(one) not in (torch.Tensor, nn.Parameter) or not one.is_floating_point() or one.is_meta:
            raise TrainingError(
                f"{name}: expected a plain floating-point tensor with data, got {type(one).__name__} of "
                f"{one.dtype} on {one.device}."
            )
        if one.numel():
            last = sum((size - 1) * stride for size, stride in zip(one.shape, one.stride(), strict=True))
            extents.append(
                (str(one.device), one.data_ptr(), one.data_ptr() + (last + 1) * one.element_size(), name)
            )
    extents.sort()
    for (device, _, stop, name), (other_device, start, _, other) in pairwise(extents):
        if device == other_device and start < stop:
            raise TrainingError(
                f"{name} and {other} are two parameters over the same memory; one would change while the other's "
                "gradient is not known yet. Tie them by assigning one Parameter object to both places."
            )
