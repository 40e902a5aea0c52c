"""A ticket in training: pruned weights that stay zero, whoever steps the optimizer.

Three hooks hold them. A gradient is masked as it is accumulated, and again before an optimizer's step if it was
written to since (clipped or all-reduced); after the step the weights are masked. The optimizer's state is masked
before the first step, for what it holds of times before the ticket. Most optimizers then keep it zero, so that it
costs no more than reading a few version counters; that of others is masked after each step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lottery_tickets._dtensors import is_sharded, local_of
from lottery_tickets.errors import MaskAppliedError
from lottery_tickets.masks._applied import check_gradient, refuse_nesting, zero_pruned
from lottery_tickets.masks._bits import unpack_there
from lottery_tickets.masks._mask import Mask, as_mask
from lottery_tickets.masks._parameters import places_of
from lottery_tickets.masks._sharded import ShardedMask, ticket_of

# Where gradient, weight and state are zero they stay so under these, whatever stands elsewhere in the tensor.
_KEEPERS = (
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.RMSprop),
    torch.optim.LBFGS,
)
# Numbers of the whole tensor, which have its shape where that is ().
_COUNTERS = ("step",)


@contextmanager
def held(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """Train the ticket: inside the block pruned weights are zero after every optimizer step.

    The pruned weights are set to zero on entering, get no gradient, and are zero after each `step()` of any torch
    optimizer that steps them (momentum, weight decay, Adam; foreach and fused ones; L-BFGS), whose state for them
    is zero too. A loop of one's own that writes weights by gradients holds them as well, since the gradients are
    masked. `copy.deepcopy` copies of the model are held from their first forward pass on; `torch.compile` and
    data-parallel wrappers share the parameters and need nothing. On leaving, by whatever way, the hooks are gone;
    the zeros stay.

    What is written through `.data`, which torch does not count, into weights is gone after the next step; into
    gradients or optimizer states it is the writer's to mask.

    Extra memory: the packed mask, and once more on each other device that weights lie on.

    On the CPU give Adam `fused=True`: its other steps take the root of a zero for every pruned weight, which is
    several times slower there than that of other numbers.

    Of a sharded model (FSDP2, tensor parallelism) every rank holds its own shards; all enter and leave.

    Args:
        model: Any module that lets its parameters be masked in place.
        mask: A `Mask`, a `ShardedMask` or a plain dict of tensors, over any part of the model's parameters.

    Yields:
        The model.

    Raises:
        MaskMismatchError: Names or shapes that the model does not have; nothing is changed then.
        WeightsError: Parameters on the meta device.
        MaskAppliedError: A mask is applied to the model or held in it already, or a gradient is sparse.

    Example:
        >>> import torch
        >>> from lottery_tickets import held
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        >>> with held(layer, {"weight": torch.tensor([[False, True]])}):
        ...     for _ in range(3):
        ...         layer(torch.ones(1, 2)).sum().backward()
        ...         optimizer.step()
        >>> layer.weight[0, 0].item(), layer.weight.grad[0, 0].item()
        (0.0, 0.0)

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 1: training f(x; m * theta).
    """
    refuse_nesting(model)
    if any(isinstance(hook, _Holder) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        raise MaskAppliedError(
            f"{type(model).__name__}: a mask is held in this model already; leave that block first, or combine "
            "the masks with & and hold the result."
        )
    holder = _Holder(mask if isinstance(mask, ShardedMask) else as_mask(mask))
    handles = [
        register_optimizer_step_pre_hook(holder.before_step),
        register_optimizer_step_post_hook(holder.after_step),
        model.register_forward_pre_hook(holder),
    ]
    _HOLDERS.append(holder)
    try:
        holder.take(model)
        yield model
    finally:
        for handle in handles:
            handle.remove()
        _HOLDERS.remove(holder)
        holder.let_go()


def zero_held(parameter: torch.Tensor, *beside: torch.Tensor) -> None:
    """Zero what is pruned of a parameter and of tensors of its shape, by every block that holds it.

    For optimizers that step something else in a parameter's place, and write it afterwards.
    """
    for holder in _HOLDERS:
        holder.zero(parameter, *beside)


@dataclass(eq=False)
class _Held:
    """One parameter, and which tensors are known to be zero where it is pruned: object and version of each."""

    parameter: weakref.ref[torch.Tensor]
    name: str
    weight: int = -1
    gradient: _Known | None = None
    state: tuple[_Known, ...] = ()


class _Known:
    """A tensor as it was when it was looked at last."""

    __slots__ = ("_tensor", "_version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor, self._version = weakref.ref(tensor), tensor._version

    def is_still(self, tensor: torch.Tensor) -> bool:
        return self._tensor() is tensor and self._version == tensor._version


class _Holder:
    """What is held: the parameters of a model and of its copies, each with the name of its bits."""

    def __init__(self, mask: Mask | ShardedMask) -> None:
        self._mask = mask
        self._held: dict[int, _Held] = {}
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[Any] = []
        self._elsewhere: dict[tuple[str, torch.device], torch.Tensor] = {}
        self._stepping: dict[int, list[tuple[torch.Tensor, _Held]]] = {}

    def __call__(self, module: nn.Module, _args: object) -> None:
        """Before a forward pass: a module that is not known is a copy."""
        # A compiled model shares its parameters with the one that is held, and hooks would break its graph.
        if not torch.compiler.is_compiling() and module not in self._models:
            self.take(module)

    def __deepcopy__(self, _memo: object) -> _Holder:
        return self

    def __reduce__(self) -> tuple[Callable[[], Callable[..., None]], tuple[()]]:
        return _nothing_held, ()

    def take(self, model: nn.Module) -> None:
        """Zero the pruned weights and mask their gradients from now on."""
        parameters, self._ticket = ticket_of(model, self._mask)
        for name, places in places_of(model, parameters).items():
            # Tied weights may be several objects over the same memory, each with a gradient of its own.
            objects = {id(one): one for module, key in places if (one := module._parameters[key]) is not None}
            for one in objects.values():
                self._held[id(one)] = _Held(weakref.ref(one), name)
                if one.requires_grad:
                    hook = one.register_post_accumulate_grad_hook(self._mask_gradient)  # type: ignore[no-untyped-call]
                    self._handles.append(hook)
                if one.grad is not None:
                    self._mask_gradient(one)
                self._zero(one, name)
        self._models.add(model)

    def let_go(self) -> None:
        """Zero what was written since, and forget all."""
        for handle in self._handles:
            handle.remove()
        for held in self._held.values():
            parameter = held.parameter()
            if parameter is not None:
                self._zero(parameter, held.name)
        self._held.clear()
        self._elsewhere.clear()
        self._stepping.clear()

    def zero(self, parameter: torch.Tensor, *beside: torch.Tensor) -> None:
        """Zero what is pruned of a parameter, if it is held, and of tensors of its shape."""
        held = self._of(parameter)
        if held is not None:
            for one in (parameter, *beside):
                self._zero(one, held.name)

    def before_step(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Mask the gradients that the step will see, and the state that it will start from."""
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        # A step passes over parameters without a gradient, and those may be in use: an optimizer that steps each
        # parameter inside the backward pass is called when others wait for theirs. Where none has one, the step
        # makes them itself, or they have been used. L-BFGS passes over none.
        if not isinstance(optimizer, torch.optim.LBFGS):
            parameters = [one for one in parameters if one.grad is not None] or parameters
        stepped = [(one, held) for one in parameters if (held := self._of(one)) is not None]
        # Decay would carry into the state what was written to weights past torch's counter.
        decays = any(group.get("weight_decay") for group in optimizer.param_groups)
        self._stepping[id(optimizer)] = stepped
        for parameter, held in stepped:
            gradient = parameter.grad
            if gradient is not None and not (held.gradient and held.gradient.is_still(gradient)):
                self._mask_gradient(parameter)
            if decays or held.weight != parameter._version:
                self._zero(parameter, held.name)
            self._clean(optimizer, parameter, held)

    def after_step(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Zero the pruned weights and what the optimizer keeps of them."""
        keeps_zeros = _keeps_zeros(optimizer)
        for parameter, held in self._stepping.pop(id(optimizer), ()):
            self._zero(parameter, held.name)
            held.weight = parameter._version
            if keeps_zeros:
                held.state = _known(_states(optimizer, parameter))
            else:
                self._clean(optimizer, parameter, held)

    def _clean(self, optimizer: torch.optim.Optimizer, parameter: torch.Tensor, held: _Held) -> None:
        """Zero the optimizer's state where it is not known to be."""
        states = _states(optimizer, parameter)
        if len(states) != len(held.state) or not all(map(_is_still, held.state, states)):
            for _, part in states:
                self._zero(part, held.name)
            held.state = _known(states)

    def _of(self, parameter: torch.Tensor) -> _Held | None:
        held = self._held.get(id(parameter))
        # An id may be another tensor's by now.
        return held if held is not None and held.parameter() is parameter else None

    def _mask_gradient(self, parameter: torch.Tensor) -> None:
        held, gradient = self._held[id(parameter)], parameter.grad
        assert gradient is not None
        check_gradient(held.name, parameter)
        self._zero(gradient, held.name)
        held.gradient = _Known(gradient)

    def _zero(self, tensor: torch.Tensor, name: str) -> None:
        packed = self._ticket.packed(name)
        local = local_of(tensor)
        if local.is_cpu:
            zero_pruned(tensor, packed)
            return
        place = name, local.device
        if place not in self._elsewhere:  # carried over once, not at every step
            self._elsewhere[place] = torch.from_numpy(packed.copy()).to(local.device)
        local.detach().masked_fill_(~unpack_there(self._elsewhere[place], local.shape), 0)
        torch.autograd.graph.increment_version(tensor)


_HOLDERS: list[_Holder] = []


def _keeps_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """Whether state that is zero stays zero in its step; 0 / eps is no zero where eps is none."""
    return type(optimizer) in _KEEPERS and all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)


_States = list[tuple[torch.Tensor, torch.Tensor]]


def _states(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> _States:
    """What the optimizer keeps for each element of a parameter: the tensor, and the parameter's part of it."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return list(_flat_states(optimizer, parameter))
    shape = local_of(parameter).shape
    return [
        (value, value)
        for key, value in optimizer.state.get(parameter, {}).items()
        if key not in _COUNTERS
        and (type(value) is torch.Tensor or is_sharded(value))
        and local_of(value).shape == shape
    ]


def _known(states: _States) -> tuple[_Known, ...]:
    return tuple(_Known(whole) for whole, _ in states)


def _is_still(known: _Known, state: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return known.is_still(state[0])


def _flat_states(
    optimizer: torch.optim.LBFGS, parameter: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """L-BFGS keeps vectors over all parameters, one after the other, under the first of them."""
    parameters = optimizer.param_groups[0]["params"]
    start = 0
    for one in parameters:
        if one is parameter:
            break
        start += one.numel()
    state = optimizer.state.get(parameters[0], {})
    vectors = [state.get("d"), state.get("prev_flat_grad")]
    vectors += [*(state.get("old_dirs") or ()), *(state.get("old_stps") or ())]
    for vector in vectors:
        if vector is not None:
            yield vector, vector[start : start + parameter.numel()]


def _nothing_held() -> Callable[..., None]:
    """What a pickled model has in the holder's place: the block that held it is not there any more."""
    return _pass


def _pass(_module: nn.Module, _args: object) -> None:
    return None
