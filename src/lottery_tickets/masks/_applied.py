"""A ticket in the place of its model: for the time of a `with` block, or for good.

Inside the block the dense weights stay where they are, untouched. Reading a masked attribute (`layer.weight`)
makes a masked copy for the one who reads it, so what is lost at an exception, an interrupt or a closed generator
is that copy. The copy is not kept for the backward pass either: autograd saves a recipe for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from lottery_tickets._dtensors import is_sharded, local_of
from lottery_tickets.errors import MaskAppliedError, MaskMismatchError
from lottery_tickets.masks import _bits
from lottery_tickets.masks._bits import PackedBits
from lottery_tickets.masks._buffers import Buffers
from lottery_tickets.masks._mask import Mask
from lottery_tickets.masks._parameters import Place, places_of
from lottery_tickets.masks._sharded import ticket_of
from lottery_tickets.masks._shards import reshard

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MARK = "_lottery_tickets_masked"
# Models whose shards are masked for the time of a block.
_SHARDS_MASKED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def applied(model: nn.Module, mask: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    """Compute with the ticket: inside the block, pruned weights are zero.

    Every read of a masked parameter through its module gives a masked copy; pruned weights get no gradient. The
    parameters themselves, as `model.parameters()` and `state_dict()` list them, are never written, so on leaving,
    by whatever way, the model is bit for bit what it was. Extra memory: the packed mask and the copies that are
    alive at one time, one per layer that is computing. The backward pass belongs inside the block.

    A sharded model (FSDP2, tensor parallelism) is put together from its shards in the middle of a forward pass, so
    there the shards are masked: what they lose is kept, one value for each pruned weight of this rank, and put
    back on leaving, bit for bit. All ranks enter and leave.

    Args:
        model: Any module; its mode, flags and hooks are left alone.
        mask: A `Mask`, a `ShardedMask` or a plain dict of tensors, over any part of the model's parameters.

    Yields:
        The model.

    Raises:
        MaskMismatchError: Names or shapes that the model does not have, or a mask sharded in another way.
        WeightsError: Parameters on the meta device.
        MaskAppliedError: A mask is already applied to one of these layers, or a layer hides its weights from
            its attributes (recurrent layers, TorchScript).

    Example:
        >>> import torch
        >>> from lottery_tickets import applied
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> with applied(layer, {"weight": torch.tensor([[False, True]])}):
        ...     out = layer(torch.tensor([[5.0, 0.0]]))
        >>> out.item()
        0.0
    """
    refuse_nesting(model)
    parameters, ticket = ticket_of(model, mask)
    sharded = any(is_sharded(parameter) for parameter in parameters.values())
    with masked_shards(model, parameters, ticket) if sharded else _masked_reads(model, parameters, ticket):
        yield model


@contextmanager
def _masked_reads(model: nn.Module, parameters: Mapping[str, torch.Tensor], ticket: Mask) -> Iterator[None]:
    """Modules whose masked parameters read as masked copies."""
    places = places_of(model, parameters)
    changes: dict[nn.Module, dict[str, PackedBits]] = {}
    for name, found in places.items():
        for module, attribute in found:
            _check_maskable(name, Place(module, attribute))
            changes.setdefault(module, {})[attribute] = ticket.packed(name)
    copies = _Copies()
    classes = {module: type(module) for module in changes}
    try:
        for module, attributes in changes.items():
            module.__class__ = _masked_class(type(module), attributes, copies)
        with torch.autograd.graph.saved_tensors_hooks(copies.save, copies.restore):
            yield
    finally:
        for module, original in classes.items():
            module.__class__ = original


def apply_mask(
    model: nn.Module, mask: Mapping[str, torch.Tensor], clone_weights: bool = False
) -> dict[str, torch.Tensor] | None:
    """Set the pruned weights to zero for good, in place.

    Args:
        model: The model to prune; all is checked before anything is written. Of a sharded model every rank prunes
            what it holds.
        mask: A `Mask`, a `ShardedMask` or a plain dict of tensors.
        clone_weights: Return what was removed, for `remove_mask`.

    Returns:
        With `clone_weights`, name to the removed weights: one-dimensional, row-major, in the parameter's dtype
        on its device; of a sharded model those of this rank. Otherwise None.

    Raises:
        MaskMismatchError: Names or shapes that the model does not have.
        WeightsError: Parameters on the meta device.

    Example:
        >>> import torch
        >>> from lottery_tickets import apply_mask, remove_mask
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> mask = {"weight": torch.tensor([[False, True]])}
        >>> removed = apply_mask(layer, mask, clone_weights=True)
        >>> layer.weight[0, 0].item(), removed["weight"].shape
        (0.0, torch.Size([1]))
        >>> remove_mask(layer, mask, removed)
    """
    parameters, ticket = ticket_of(model, mask)
    removed = removed_weights(parameters, ticket) if clone_weights else None
    for name, weight in parameters.items():
        zero_pruned(weight, ticket.packed(name))
    return removed


def remove_mask(
    model: nn.Module, mask: Mapping[str, torch.Tensor], original_weights: Mapping[str, torch.Tensor]
) -> None:
    """Put back what `apply_mask` removed; the kept weights stay as they are.

    Args:
        model: The pruned model.
        mask: The mask that was applied.
        original_weights: For every tensor of the mask, either the removed weights as `apply_mask` returned them,
            or the whole tensor (of a sharded model this rank's part) as it was before.

    Raises:
        MaskMismatchError: Weights missing, or of another number or dtype; nothing is written then.

    Example:
        >>> import torch
        >>> from lottery_tickets import apply_mask, remove_mask
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> mask = {"weight": torch.tensor([[False, True]])}
        >>> remove_mask(layer, mask, apply_mask(layer, mask, clone_weights=True))
        >>> torch.equal(layer.weight, before)
        True
    """
    parameters, ticket = ticket_of(model, mask)
    for name, weight in parameters.items():
        _check_original(name, local_of(weight), ticket, original_weights)
    for name, weight in parameters.items():
        put_back(weight, ticket[name], local_of(original_weights[name]))


def removed_weights(parameters: Mapping[str, torch.Tensor], ticket: Mask) -> dict[str, torch.Tensor]:
    """Name to the pruned weights of what this rank holds, flat."""
    held = {name: local_of(parameter).detach() for name, parameter in parameters.items()}
    return {name: weight[~ticket[name].to(weight.device)] for name, weight in held.items()}


def put_back(parameter: torch.Tensor, kept: torch.Tensor, original: torch.Tensor) -> None:
    """Write the pruned weights of what this rank holds: flat, or where they stand in a tensor of its shape."""
    weight = local_of(parameter).detach()
    original, pruned = original.to(weight.device), ~kept.to(weight.device)
    weight[pruned] = original[pruned] if original.shape == weight.shape else original
    if is_sharded(parameter):  # a tensor around this one, with a count of its own
        torch.autograd.graph.increment_version(parameter)


def zero_pruned(tensor: torch.Tensor, packed: PackedBits) -> None:
    """Set the elements whose bit is not set to +0, in place, the others staying bit for bit.

    Of a sharded tensor the bits are those of this rank's part.
    """
    data = local_of(tensor).detach()
    if data.is_cpu and data.is_contiguous():
        integers = _as_integers(data)
        _keep(integers, packed, integers)
    else:
        data.masked_fill_(~_bits.unpack(packed, data.shape).to(data.device), 0)
    torch.autograd.graph.increment_version(tensor)


class _Recipe(NamedTuple):
    """How to make a masked copy again in the backward pass."""

    copies: _Copies
    weight: torch.Tensor
    packed: PackedBits
    version: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def __call__(self) -> torch.Tensor:
        if self.weight._version != self.version:
            raise RuntimeError(
                "A masked weight was modified in place between the forward and the backward pass; "
                "step the optimizer after backward()."
            )
        masked = masked_copy(self.weight, self.packed, self.copies.buffers)
        return masked.as_strided(self.size, self.stride, self.offset)


class _Copies:
    """The masked copies that are alive, so that autograd saves their recipes and not their memory."""

    def __init__(self) -> None:
        self.buffers = Buffers()
        self._alive: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor, PackedBits]] = {}

    def make(self, weight: torch.Tensor, packed: PackedBits) -> torch.Tensor:
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return masked_copy(weight.detach(), packed, self.buffers)
        masked: torch.Tensor = _MaskedWeight.apply(weight, packed, self.buffers)  # type: ignore[no-untyped-call]
        # While the object lives no other storage can have its address, so a match by address is a true one.
        address = masked.untyped_storage().data_ptr()
        self._alive[address] = (weakref.ref(masked), weight.detach(), packed)
        return masked

    def save(self, tensor: torch.Tensor) -> torch.Tensor | _Recipe:
        entry = self._alive.get(tensor.untyped_storage().data_ptr()) if _has_storage(tensor) else None
        if entry is None or entry[0]() is None or tensor._version:  # a copy that was written is no copy
            return tensor
        _, weight, packed = entry
        return _Recipe(
            self, weight, packed, weight._version, tensor.shape, tensor.stride(), int(tensor.storage_offset())
        )

    @staticmethod
    def restore(saved: torch.Tensor | _Recipe) -> torch.Tensor:
        return saved() if isinstance(saved, _Recipe) else saved


class _MaskedWeight(torch.autograd.Function):
    """weight * mask, whose gradient is gradient * mask; saves the packed bits only."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, packed: PackedBits, buffers: Buffers | None) -> torch.Tensor:
        ctx.packed = packed
        return masked_copy(weight, packed, buffers)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        # The map is linear, so it is its own derivative; applied as such, it has one in turn.
        # A gradient stays as long as its parameter, so it gets memory of its own.
        return _MaskedWeight.apply(gradients[0], ctx.packed, None), None, None  # type: ignore[no-untyped-call]


def check_gradient(name: str, parameter: torch.Tensor) -> None:
    """Refuse a gradient that the bits of its parameter do not fit."""
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise MaskAppliedError(
            f"{name}: its gradient is {gradient.layout}, which cannot be masked in place; use a layer "
            "with dense gradients (sparse=False), or leave it out of the mask."
        )
    parts = local_of(gradient).shape, local_of(parameter).shape
    if parts[0] != parts[1]:
        raise MaskAppliedError(
            f"{name}: this rank holds {tuple(parts[1])} of it and {tuple(parts[0])} of its gradient, so the mask "
            "does not fit that; redistribute the gradient as the parameter is."
        )


@contextmanager
def masked_shards(model: nn.Module, parameters: Mapping[str, torch.Tensor], ticket: Mask) -> Iterator[None]:
    """Shards without their pruned weights and gradients of these, for the time of the block."""
    removed = removed_weights(parameters, ticket)

    def mask_gradient(name: str, parameter: torch.Tensor) -> None:
        check_gradient(name, parameter)
        zero_pruned(parameter.grad, ticket.packed(name))  # type: ignore[arg-type]

    handles = [
        parameter.register_post_accumulate_grad_hook(partial(mask_gradient, name))  # type: ignore[no-untyped-call]
        for name, parameter in parameters.items()
        if parameter.requires_grad
    ]
    _SHARDS_MASKED.add(model)
    try:
        for name, parameter in parameters.items():
            zero_pruned(parameter, ticket.packed(name))
        yield
    finally:
        for name, parameter in parameters.items():
            put_back(parameter, ticket[name], removed.pop(name))
        # What was put together inside the block was made of masked shards.
        reshard(model)
        _SHARDS_MASKED.discard(model)
        for handle in handles:
            handle.remove()


def _masked_class(original: type, attributes: Mapping[str, PackedBits], copies: _Copies) -> type:
    """Subclass in which these parameters read as masked copies."""
    namespace: dict[str, Any] = {
        attribute: property(_masked_reader(attribute, packed, copies)) for attribute, packed in attributes.items()
    }
    namespace["__reduce_ex__"] = _refuse_copy
    namespace |= {_MARK: True, "__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (original,), namespace)


def _refuse_copy(module: nn.Module, _protocol: object) -> str:
    raise MaskAppliedError(
        f"{type(module).__name__}: a module cannot be copied or pickled while a mask is applied to it; do so "
        "outside the block, and for a pruned copy use apply_mask on a copy."
    )


def _masked_reader(attribute: str, packed: PackedBits, copies: _Copies) -> Callable[[nn.Module], torch.Tensor]:
    def read(module: nn.Module) -> torch.Tensor:
        weight = module._parameters[attribute]
        assert weight is not None, attribute
        return copies.make(weight, packed)

    return read


def refuse_nesting(model: nn.Module) -> None:
    """Raise MaskAppliedError where a mask is applied already."""
    for name, module in model.named_modules():
        if getattr(type(module), _MARK, False) or module in _SHARDS_MASKED:
            raise MaskAppliedError(
                f"{name or type(module).__name__}: a mask is already applied to this layer; leave that block "
                "first, or combine the masks with & and apply the result."
            )


def _check_maskable(name: str, place: Place) -> None:
    module = place.module
    if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
        raise MaskAppliedError(
            f"{name}: {type(module).__name__} reads its weights past its attributes, so they cannot be masked "
            "for a while; use apply_mask and remove_mask."
        )


def masked_copy(weight: torch.Tensor, packed: PackedBits, buffers: Buffers | None = None) -> torch.Tensor:
    """Contiguous copy with the pruned weights +0, bit for bit otherwise."""
    if not weight.is_cpu:
        kept = _bits.unpack(packed, weight.shape).to(weight.device)
        return torch.where(kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
    make = torch.empty if buffers is None else buffers.empty
    masked = make(weight.shape, dtype=weight.dtype)
    _keep(_as_integers(weight.detach().contiguous()), packed, _as_integers(masked))
    return masked


def _keep(weights: np.ndarray[Any, Any], packed: PackedBits, kept: np.ndarray[Any, Any]) -> None:
    from lottery_tickets import _kernels

    _kernels.keep(weights, packed, kept)


def _as_integers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Flat view of a contiguous CPU tensor as integers of its width."""
    return tensor.view(-1).view(_INTEGERS[tensor.element_size()]).numpy()


def _has_storage(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and type(tensor) in (torch.Tensor, nn.Parameter)


def _check_original(
    name: str, weight: torch.Tensor, ticket: Mask, original_weights: Mapping[str, torch.Tensor]
) -> None:
    if not isinstance(original_weights, Mapping):
        raise MaskMismatchError(
            "original_weights: expected a dict of tensors by parameter name, got "
            f"{type(original_weights).__name__}; apply_mask returns one with clone_weights=True."
        )
    if name not in original_weights:
        raise MaskMismatchError(f"{name}: original_weights lacks it; give what apply_mask returned.")
    if not isinstance(original_weights[name], torch.Tensor):
        held = type(original_weights[name]).__name__
        raise MaskMismatchError(f"{name}: original_weights holds {held}, expected a tensor.")
    original = local_of(original_weights[name])
    removed = weight.numel() - _bits.count(ticket.packed(name))
    if original.dtype != weight.dtype or original.shape not in (weight.shape, torch.Size([removed])):
        raise MaskMismatchError(
            f"{name}: expected the {removed} removed weights or a tensor of shape {tuple(weight.shape)}, both "
            f"{weight.dtype}; got shape {tuple(original.shape)}, {original.dtype}."
        )
