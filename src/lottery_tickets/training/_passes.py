"""Backward passes that hand each gradient on as soon as it is complete, and keep none."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import is_sharded, local_of
from lottery_tickets.training._graph import uses_of
from lottery_tickets.training._turns import Receive, Turns
from lottery_tickets.training._weights import all_finite, blocks, combined, is_finite, is_half, norm_of

Clip = Literal["tensor", "global"]
Update = Callable[[int, torch.Tensor, float | None], None]
_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Passes:
    """The backward passes of one optimizer: what comes of them is told, how weights are updated is the caller's.

    Args:
        named: Name and parameter, each once; those that do not require gradients are passed over.
        update: `update(index, gradient, coefficient)`: the step of one parameter, whose gradient counts times the
            coefficient (None for 1). The gradient must not be written to: another's may share its memory. It is
            in float32 at least where micro-batches were accumulated, else in the parameter's data type.
        max_grad_norm: Largest norm of a gradient; None for any.
        clip: Whether that is the norm of each tensor or of all together.
        finish: Called when `update` has been told all gradients of a pass. Where it is given they may wait for
            each other, and are handed on when the pass is over.
        ranks: Gradients are sums over these; None for this process alone. Where parameters are DTensors the model
            adds them up itself, each rank is told of its parts, and norms are those of the whole.

    Attributes:
        nonfinite: Names of the parameters whose gradient was infinite or NaN in the latest update; none of these
            has been updated.
        moved: How many parameters the latest update has changed so far.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        update: Update,
        *,
        max_grad_norm: float | None,
        clip: Clip,
        finish: Callable[[], None] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        if clip not in get_args(Clip):
            raise TrainingError(f"clip is one of {', '.join(get_args(Clip))}; got {clip!r}.")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise TrainingError(
                f"max_grad_norm is a positive number, or None for no clipping; got {max_grad_norm}."
            )
        self.nonfinite: tuple[str, ...] = ()
        self.moved = 0
        self._named, self._update, self._finish = list(named), update, finish
        self._max_norm, self._clip = max_grad_norm, clip
        self._ranks = ranks or Ranks()
        self._sharded = any(is_sharded(parameter) for _, parameter in named)
        self._held: dict[int, torch.Tensor] = {}

    @property
    def holds_gradients(self) -> bool:
        """Whether micro-batches have been accumulated and not yet used."""
        return bool(self._held)

    def scale(self, factor: float) -> None:
        """Multiply what was accumulated."""
        for held in self._held.values():
            held.mul_(factor)

    def forget(self) -> None:
        """Drop what was accumulated."""
        self._held.clear()

    def accumulate(self, loss: torch.Tensor) -> None:
        """Add the loss's gradients to those held; the first time that takes float32 memory for each weight."""
        self._run(loss, self._add)

    def backward(self, loss: torch.Tensor) -> None:
        """Update every parameter on the loss's way back, or after it where all gradients must be known first."""
        self.nonfinite, self.moved = (), 0
        if self._ranks.size > 1 and not self._sharded:
            self._go_back_together(loss)
        else:
            self._go_back(loss)
        if self._finish is not None and self.moved:
            self._finish()

    def _go_back(self, loss: torch.Tensor) -> None:
        if self._max_norm is None or self._clip == "tensor":
            if self._finish is None:
                self._run(loss, self._step)
            else:
                self._step_all(self._gathered(loss))
            self._use_held()
        elif self._held:
            self.accumulate(loss)
            self._use_held()
        elif self._finish is not None:
            self._apply_clipped(self._gathered(loss))
        else:
            coefficient = self._first_pass(loss)
            if not self.nonfinite:
                self._run(loss, lambda index, gradient: self._apply(index, gradient, coefficient))

    def _go_back_together(self, loss: torch.Tensor) -> None:
        """The same by sums over ranks; each step follows its sum, unless all gradients must be known first."""
        sums: dict[int, torch.Tensor] = {}
        clips_all = self._max_norm is not None and self._clip == "global"
        at_once = self._finish is None and not clips_all
        receive: Receive = self._step if at_once else sums.__setitem__
        if at_once and not self._held:
            positions = {id(one): index for index, (_, one) in enumerate(self._named)}
            turns = Turns(self._ranks, self._named, uses_of(loss.grad_fn, positions), receive)
            self._run(loss, turns.take)
        else:
            self.accumulate(loss)
            turns = Turns(self._ranks, self._named, self._held, receive)
            for index in sorted(self._held, reverse=True):
                turns.take(index, self._held.pop(index))
        turns.finish()
        if clips_all:
            self._apply_clipped(sums)
        elif not at_once:
            self._step_all(sums)

    def use(self, gradients: dict[int, torch.Tensor]) -> None:
        """Update from gradients that somebody else made, and from those held."""
        self.nonfinite, self.moved = (), 0
        for index, gradient in gradients.items():
            self._add(index, gradient)
        self._use_held()
        if self._finish is not None and self.moved:
            self._finish()

    def _gathered(self, loss: torch.Tensor) -> dict[int, torch.Tensor]:
        try:
            return gathered_gradients(loss, self._named)
        except BaseException:
            self.forget()
            raise

    def _step_all(self, gradients: dict[int, torch.Tensor]) -> None:
        if self._held or self._sharded or self._max_norm is not None or not all_finite([*gradients.values()]):
            for index, gradient in gradients.items():
                self._step(index, gradient)
            return
        for index, gradient in gradients.items():
            self._apply(index, gradient, None)

    def _use_held(self) -> None:
        held, self._held = self._held, {}
        if self._max_norm is None or self._clip == "tensor":
            for index in sorted(held):
                self._step(index, held.pop(index))
            return
        self._apply_clipped(held)

    def _apply_clipped(self, gradients: dict[int, torch.Tensor]) -> None:
        """Update by all of them, scaled down by the norm of all, or by none."""
        norms = {index: self._norm(index, gradients[index]) for index in sorted(gradients)}
        if self.nonfinite:
            return
        coefficient = self._coefficient(combined(list(norms.values())))
        for index in sorted(gradients):
            self._apply(index, gradients.pop(index), coefficient)

    def _first_pass(self, loss: torch.Tensor) -> float | None:
        """The coefficient that brings the norm of all gradients down to the largest allowed."""
        norms: dict[int, torch.Tensor] = {}

        def measure(index: int, gradient: torch.Tensor) -> None:
            norms[index] = self._norm(index, gradient)

        self._run(loss, measure, keep=True)
        return self._coefficient(combined([norms[index] for index in sorted(norms)]))

    def _norm(self, index: int, gradient: torch.Tensor) -> torch.Tensor:
        norm = self._norm_of_all(gradient)
        if not self._is_finite(gradient, norm):
            self.nonfinite += (self._named[index][0],)
        return norm

    def _norm_of_all(self, gradient: torch.Tensor) -> torch.Tensor:
        norm = norm_of(gradient)
        if not self._sharded:
            return norm
        squares = self._ranks.sum(np.square(np.array([norm.item()])))
        return torch.tensor(math.sqrt(squares[0]), dtype=norm.dtype)

    def _is_finite(self, gradient: torch.Tensor, norm: torch.Tensor) -> bool:
        """On all ranks the same, who have the same norm: of parts, one that overflows counts as infinite."""
        return math.isfinite(norm.item()) if self._sharded else is_finite(gradient, norm)

    def _coefficient(self, norm: torch.Tensor) -> float | None:
        if self._max_norm is None:
            return None
        coefficient = float(self._max_norm / (norm + _EPSILON))
        return coefficient if coefficient < 1 else None

    def _step(self, index: int, gradient: torch.Tensor) -> None:
        if index in self._held:
            self._add(index, gradient)
            gradient = self._held.pop(index)
        norm = self._norm_of_all(gradient)
        if self._is_finite(gradient, norm):
            self._apply(index, gradient, self._coefficient(norm))
        else:
            self.nonfinite += (self._named[index][0],)

    def _apply(self, index: int, gradient: torch.Tensor, coefficient: float | None) -> None:
        self.moved += 1  # before the update, for one that is interrupted has moved weights too
        self._update(index, gradient, coefficient)

    def _add(self, index: int, gradient: torch.Tensor) -> None:
        dtype = torch.float32 if is_half(gradient) else gradient.dtype
        if index not in self._held:
            # A copy, for gradients of two parameters may share memory.
            self._held[index] = gradient.to(dtype, copy=True)
            return
        for block in blocks(self._held[index], gradient):
            held, new = block.parts
            held.add_(new)

    def _run(
        self, loss: torch.Tensor, receive: Callable[[int, torch.Tensor], None], *, keep: bool = False
    ) -> None:
        try:
            backward_pass(loss, self._named, receive, keep=keep)
        except BaseException:
            self.forget()  # some of them may hold this pass's gradients and others not
            raise


def backward_pass(
    loss: torch.Tensor,
    named: Sequence[tuple[str, nn.Parameter]],
    receive: Callable[[int, torch.Tensor], None],
    *,
    keep: bool = False,
) -> None:
    """Go back from the loss; hand on each parameter's position and gradient and free it; keep the graph if asked.

    Hooks are there only meanwhile, and no gradient is left, whatever happens.

    Raises:
        TrainingError: A loss without a graph or of several numbers, gradients that are already there, a sparse
            gradient, or a parameter whose gradient comes in parts.
    """
    wanted = _wanted(loss, named)
    seen: set[int] = set()

    def hook_of(index: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            _check_gradient(named[index][0], gradient, again=index in seen)
            seen.add(index)
            with torch.no_grad():
                receive(index, local_of(gradient))

        return hook

    handles = [
        parameter.register_post_accumulate_grad_hook(hook_of(index))  # type: ignore[no-untyped-call]
        for index, parameter in wanted.items()
    ]
    try:
        torch.autograd.backward(loss, retain_graph=keep)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in wanted.values():
            parameter.grad = None


def gathered_gradients(loss: torch.Tensor, named: Sequence[tuple[str, nn.Parameter]]) -> dict[int, torch.Tensor]:
    """Go back from the loss; each parameter's gradient by its position, none left in `.grad`.

    Raises:
        TrainingError: A loss without a graph or of several numbers, gradients that are already there, or a sparse
            gradient.
    """
    wanted = _wanted(loss, named)
    try:
        torch.autograd.backward(loss)
        gradients = {index: local_of(one.grad) for index, one in wanted.items() if one.grad is not None}
        for index, gradient in gradients.items():
            _check_gradient(named[index][0], gradient, again=False)
    finally:
        for parameter in wanted.values():
            parameter.grad = None
    return gradients


def _wanted(loss: torch.Tensor, named: Sequence[tuple[str, nn.Parameter]]) -> dict[int, nn.Parameter]:
    """Parameters to go back to, by position; raises TrainingError where it cannot be done."""
    check_loss(loss)
    wanted = {index: parameter for index, (_, parameter) in enumerate(named) if parameter.requires_grad}
    left_over = [named[index][0] for index, parameter in wanted.items() if parameter.grad is not None]
    if left_over:
        raise TrainingError(
            f"{_some(left_over)} hold gradients of an earlier backward pass, which would be added to this one's. "
            "Call the optimizer's zero_grad() first; to add up several losses, its accumulate(loss)."
        )
    if not wanted:
        raise TrainingError("No parameter of this optimizer requires gradients; there is nothing to train.")
    return wanted


def check_loss(loss: torch.Tensor) -> None:
    """Raise TrainingError for what has no gradients."""
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TrainingError(f"A loss is a tensor of one number, got {shape}. Take the mean first.")
    if not loss.requires_grad:
        raise TrainingError(
            "The loss has no graph: no parameter that requires gradients took part in it, or it was computed "
            "under torch.no_grad()."
        )


def _check_gradient(name: str, gradient: torch.Tensor, *, again: bool) -> None:
    # Raised in the middle of a pass: other parameters may have been updated, and `moved` says how many.
    if gradient.is_sparse:
        raise TrainingError(
            f"{name} gets a sparse gradient, which is not supported; build its embedding with sparse=False. "
            "Parameters whose gradients came before it have been updated."
        )
    if again:
        raise TrainingError(
            f"The gradient of {name} comes in parts, as under reentrant checkpointing, and it was updated after "
            "the first of them; checkpoint with use_reentrant=False."
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
