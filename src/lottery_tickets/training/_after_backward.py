"""Any optimizer of torch's, behind the interface of those that step inside the backward pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.masks import is_sharded, local_of, spread_as
from lottery_tickets.training._parts import own_states, whole_states
from lottery_tickets.training._passes import check_loss
from lottery_tickets.training._turns import Turns
from lottery_tickets.training._weights import all_finite, is_finite, norm_of

Named = Iterable[tuple[str, nn.Parameter]]


class AfterBackward:
    """A torch optimizer that steps when the backward pass is over, all gradients held until then.

    Gradients of micro-batches add up in `.grad`. They are clipped exactly by the norm of all. If any is infinite
    or NaN nothing moves.

    Args:
        named: Name and parameter.
        optimizer: Over these parameters.
        max_grad_norm: For `torch.nn.utils.clip_grad_norm_`, or None.
        ranks: See `FusedSGD`.
    """

    def __init__(
        self,
        named: Named,
        optimizer: torch.optim.Optimizer,
        *,
        max_grad_norm: float | None,
        ranks: Ranks | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.nonfinite: tuple[str, ...] = ()
        self.moved = 0
        self._named, self._max_norm = list(named), max_grad_norm
        self._ranks = ranks or Ranks()
        self._sharded = any(is_sharded(one) for _, one in self._named)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's."""
        return self.optimizer.param_groups

    def accumulate(self, loss: torch.Tensor) -> None:
        """Go back from a micro-batch's loss; gradients add up in `.grad`."""
        check_loss(loss)
        torch.autograd.backward(loss)

    def backward(self, loss: torch.Tensor) -> None:
        """Go back from the loss, clip, step, and drop the gradients."""
        self.nonfinite, self.moved = (), 0
        self.accumulate(loss)
        if self._ranks.size > 1 and not self._sharded:
            self._add_up()
        there = [(name, one, one.grad) for name, one in self._named if one.grad is not None]
        self.nonfinite = self._not_finite([(name, local_of(gradient)) for name, _, gradient in there])
        if not self.nonfinite:
            if self._max_norm is not None:
                torch.nn.utils.clip_grad_norm_([one for _, one, _ in there], self._max_norm)
            self.moved = len(there)
            self.optimizer.step()
        self.zero_grad()

    def _not_finite(self, gradients: Sequence[tuple[str, torch.Tensor]]) -> tuple[str, ...]:
        """Names of those that are not, on any rank where each has parts."""
        found: tuple[str, ...] = ()
        # One sum of all tells it faster than one norm of each.
        if not all_finite([gradient for _, gradient in gradients]):
            found = tuple(name for name, gradient in gradients if not is_finite(gradient, norm_of(gradient)))
        if self._sharded:
            found = tuple(dict.fromkeys(chain(*self._ranks.gather(found))))
        return found

    def _add_up(self) -> None:
        """The sums over ranks in place of this rank's gradients."""

        def receive(index: int, total: torch.Tensor) -> None:
            one = self._named[index][1]
            one.grad = total.to(one.dtype)

        there = [index for index, (_, one) in enumerate(self._named) if one.grad is not None]
        turns = Turns(self._ranks, self._named, there, receive)
        for index in reversed(there):
            gradient = self._named[index][1].grad
            assert gradient is not None
            turns.take(index, gradient)
        turns.finish()

    @torch.no_grad()
    def scale_accumulated(self, factor: float) -> None:
        """Multiply the gradients that are there."""
        for _, one in self._named:
            if one.grad is not None:
                one.grad.mul_(factor)

    def zero_grad(self) -> None:
        """Drop gradients."""
        for _, one in self._named:
            one.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's.

        Raises:
            TrainingError: State of a parameter in parts that is neither a number nor of the parameter's shape.
        """
        inner = self.optimizer.state_dict()
        return {**inner, "state": whole_states(inner["state"], self._by_position())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state that `state_dict` gave, which is copied."""
        named = self._by_position()
        states = own_states(state_dict["state"], named)
        for index, state in states.items():
            parameter = named[index][1]
            if is_sharded(parameter):
                places = {key: one for key, one in state.items() if isinstance(one, torch.Tensor) and one.dim()}
                state.update({key: spread_as(parameter, one) for key, one in places.items()})
        self.optimizer.load_state_dict({**state_dict, "state": states})

    def _by_position(self) -> list[tuple[str, nn.Parameter]]:
        """Name and parameter as the optimizer's state numbers them."""
        names = {id(one): name for name, one in self._named}
        parameters = [one for group in self.optimizer.param_groups for one in group["params"]]
        return [(names.get(id(one), f"parameter {index}"), one) for index, one in enumerate(parameters)]
