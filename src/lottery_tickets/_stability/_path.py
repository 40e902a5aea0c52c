"""The straight line between two states, walked in the memory of a model that comes back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from lottery_tickets._stability._ends import State, end_of, own_tensors, refuse_nonfinite
from lottery_tickets.masks import Mask, apply_mask, as_mask, parameters_of
from lottery_tickets.training import blocks

# Elements computed at a time on the CPU: as many as one thread takes alone. Small steps of several threads mostly
# wait for each other, and larger blocks leave the caches: together that is two to three times as slow.
_BLOCK = 1 << 15
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Tensors = dict[str, torch.Tensor]


class Path:
    """A model on a line; made by `path_between`.

    Args:
        model: Whose memory takes the points.
        own: Its tensors by name.
        start: Where alpha is 0.
        stop: Where alpha is 1.
        mask: What both ends keep.
    """

    def __init__(self, model: nn.Module, own: Tensors, start: Tensors, stop: Tensors, mask: Mask | None) -> None:
        self._model, self._own, self._start, self._stop, self._mask = model, own, start, stop, mask
        # Integers have no points between; where nothing moves, rounding is to move nothing either.
        self._moving = {
            name
            for name, tensor in own.items()
            if (tensor.is_floating_point() or tensor.is_complex())
            and not torch.equal(start[name], stop[name].to(start[name].device))
        }

    @torch.no_grad()
    def go_to(self, alpha: float) -> None:
        """Write (1 - alpha) start + alpha stop into the model; both ends bit for bit.

        Tensors that are not floating point are those of the start, at alpha = 1 those of the stop.
        """
        for name, own in self._own.items():
            start, stop = self._start[name], self._stop[name]
            if alpha == 1:
                own.copy_(stop)
            elif alpha > 0 and name in self._moving:
                _interpolate(own, start, stop, alpha)
            else:
                own.copy_(start)
        if self._mask is not None:
            apply_mask(self._model, self._mask)


@contextmanager
def path_between(
    model: nn.Module, state_a: State, state_b: State, mask: Mapping[str, torch.Tensor] | None = None
) -> Iterator[Path]:
    """The line from one state to the other; on leaving, by whatever way, the model is bit for bit what it was.

    A tensor of a state that is the model's own is copied, since the path is walked in its memory. A tensor of the
    model is copied unless it equals one of the ends, from which it comes back.

    Raises:
        StateMismatchError: A state that is not of this model.
        MaskMismatchError: A mask that is not of this model.
        WeightsError: NaN or infinite values, or tensors on the meta device.
        CheckpointError: A file that is not a whole safetensors file.
        FileNotFoundError: No such file.
    """
    known = own_tensors(model)
    ticket = None if mask is None else as_mask(mask)
    if ticket is not None:
        parameters_of(model, ticket)
    start, stop = end_of("state_a", state_a, model, known), end_of("state_b", state_b, model, known)
    own = {name: one.tensor for name, one in known.items() if name in start and name in stop}
    start, stop = ({name: end[name] for name in own} for end in (start, stop))
    refuse_nonfinite("state_a", start, stop, ticket)
    refuse_nonfinite("state_b", stop, start, ticket)
    memories = {tensor.untyped_storage().data_ptr() for tensor in own.values() if tensor.numel()}
    start, stop = _apart(start, memories), _apart(stop, memories)
    before = {name: _kept(tensor, start[name], stop[name]) for name, tensor in own.items()}
    try:
        yield Path(model, own, start, stop, ticket)
    finally:
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(before[name])


def _apart(end: Tensors, memories: set[int]) -> Tensors:
    """The end with copies of what lies in these memories."""
    return {
        name: tensor.clone() if tensor.untyped_storage().data_ptr() in memories else tensor
        for name, tensor in end.items()
    }


def _kept(own: torch.Tensor, *ends: torch.Tensor) -> torch.Tensor:
    """What brings a tensor back: an end of the same bits, or a copy."""
    same = [end for end in ends if _same_bits(own, end)]
    return same[0] if same else own.clone()


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    integers = _INTEGERS.get(one.element_size())
    if integers is None:
        return False
    return torch.equal(one.view(integers), other.to(one.device).view(integers))


def _interpolate(own: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, alpha: float) -> None:
    """A block at a time, in float32 at least.

    From the nearer end, and by single operations, since a fused one rounds differently where there is none.
    """
    wide = own.dtype if own.is_complex() else torch.promote_types(own.dtype, torch.float32)
    share = min(alpha, 1 - alpha)
    for block in blocks(own, start, stop, size=_BLOCK if own.is_cpu else None):
        into, *ends = block.parts
        near, far = ends if alpha < 0.5 else reversed(ends)
        near = near.to(own.device, wide)
        point = into.copy_(far) if own.dtype == wide else far.to(own.device, wide)
        point.sub_(near).mul_(share).add_(near)
        if point is not into:
            into.copy_(point)
