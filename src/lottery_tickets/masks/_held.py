"""A ticket in training: pruned weights that stay zero, whoever steps the optimizer.

Three hooks hold them. A gradient is masked as it is accumulated; before an optimizer's step the gradients are
masked once more, for what was written into them since (all-reduced gradients, for one); after it the weights and
the optimizer's state are. The last needs no one's help where every element is stepped by itself, and makes up for
optimizers that mix them and for state from before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lottery_tickets.errors import MaskAppliedError
from lottery_tickets.masks._applied import refuse_nesting, zero_pruned
from lottery_tickets.masks._bits import unpack_there
from lottery_tickets.masks._mask import Mask, as_mask
from lottery_tickets.masks._parameters import parameters_of, places_of


@contextmanager
def held(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """Train the ticket: inside the block pruned weights are zero after every optimizer step.

    The pruned weights are set to zero on entering, get no gradient, and are zero after each `step()` of any torch
    optimizer (momentum, weight decay, Adam; foreach and fused ones), whose state for them is zero too. A loop of
    one's own that writes weights by gradients holds them as well, since the gradients are masked. `copy.deepcopy`
    copies of the model are held from their first forward pass on; `torch.compile` and data-parallel wrappers share
    the parameters and need nothing. On leaving, by whatever way, the hooks are gone; the zeros stay.

    Extra memory: the packed mask, and once more on each other device that weights lie on.

    Args:
        model: Any module that lets its parameters be masked in place.
        mask: A `Mask` or a plain dict of tensors, over any part of the model's parameters.

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
    ticket = as_mask(mask)
    refuse_nesting(model)
    if any(isinstance(hook, _Holder) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        raise MaskAppliedError(
            f"{type(model).__name__}: a mask is held in this model already; leave that block first, or combine "
            "the masks with & and hold the result."
        )
    holder = _Holder(ticket)
    handles = [
        register_optimizer_step_pre_hook(holder.before_step),
        register_optimizer_step_post_hook(holder.after_step),
        model.register_forward_pre_hook(holder),
    ]
    try:
        holder.take(model)
        yield model
    finally:
        for handle in handles:
            handle.remove()
        holder.let_go()


class _Holder:
    """What is held: the parameters of a model and of its copies, each with the name of its bits."""

    def __init__(self, ticket: Mask) -> None:
        self._ticket = ticket
        self._names: dict[int, str] = {}
        self._held: dict[int, weakref.ref[torch.Tensor]] = {}
        self._models: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._handles: list[Any] = []
        self._elsewhere: dict[tuple[str, torch.device], torch.Tensor] = {}

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
        for name, places in places_of(model, parameters_of(model, self._ticket)).items():
            # Tied weights may be several objects over the same memory, each with a gradient of its own.
            objects = {id(one): one for module, key in places if (one := module._parameters[key]) is not None}
            for one in objects.values():
                self._names[id(one)] = name
                self._held[id(one)] = weakref.ref(one)
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
        for key, reference in self._held.items():
            parameter = reference()
            if parameter is not None:
                self._zero(parameter, self._names[key])
        self._held.clear()
        self._names.clear()
        self._elsewhere.clear()

    def before_step(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Mask the gradients that the step will see."""
        for parameter, _ in self._stepped(optimizer):
            if parameter.grad is not None:
                self._mask_gradient(parameter)

    def after_step(self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object) -> None:
        """Zero the pruned weights and what the optimizer keeps of them."""
        for parameter, name in self._stepped(optimizer):
            self._zero(parameter, name)
            for value in optimizer.state.get(parameter, {}).values():
                if type(value) is torch.Tensor and value.shape == parameter.shape:
                    self._zero(value, name)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, str]]:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                reference = self._held.get(id(parameter))
                one = None if reference is None else reference()
                if one is not None and one is parameter:  # an id may be another tensor's by now
                    yield one, self._names[id(parameter)]

    def _mask_gradient(self, parameter: torch.Tensor) -> None:
        name, gradient = self._names[id(parameter)], parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise MaskAppliedError(
                f"{name}: its gradient is {gradient.layout}, which cannot be masked in place; use a layer with "
                "dense gradients (sparse=False), or leave it out of the mask."
            )
        self._zero(gradient, name)

    def _zero(self, tensor: torch.Tensor, name: str) -> None:
        if tensor.is_cpu:
            zero_pruned(tensor, self._ticket.packed(name))
            return
        place = name, tensor.device
        if place not in self._elsewhere:  # carried over once, not at every step
            self._elsewhere[place] = torch.from_numpy(self._ticket.packed(name).copy()).to(tensor.device)
        tensor.detach().masked_fill_(~unpack_there(self._elsewhere[place], tensor.shape), 0)
        torch.autograd.graph.increment_version(tensor)


def _nothing_held() -> Callable[..., None]:
    """What a pickled model has in the holder's place: the block that held it is not there any more."""
    return _pass


def _pass(_module: nn.Module, _args: object) -> None:
    return None
