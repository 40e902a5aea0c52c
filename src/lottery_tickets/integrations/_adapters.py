"""What lies beneath wrappers: adapters of PEFT, whose merge fills zeros, and torch.compile."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import nn

from lottery_tickets.inspection import validate_pruning_correctness
from lottery_tickets.masks import Mask, apply_mask, as_mask, parameters_of

_log = logging.getLogger(__name__)


def compute_filled_zeros(
    model: nn.Module, mask: Mapping[str, torch.Tensor], *, remask: bool = False
) -> dict[str, int]:
    r"""Layers in which pruned weights are not zero, as after adapters were merged into a ticket.

    A low-rank adapter trains beside the weights, and its merge

    $$W' = m \odot W + \frac{\alpha}{r} B A$$

    is dense: it fills the zeros of the mask m. Masking once more, which `remask` does, keeps the ticket and loses
    what the adapter had learnt there, so evaluate the model afterwards.

    Args:
        model: After `merge_and_unload()`, or with its adapters still there (then the weights beneath them count,
            as after `merge_adapter()`).
        mask: The ticket, by the names of the model without adapters.
        remask: Set the filled weights to zero.

    Returns:
        Parameter name to the number of pruned weights that the merge had filled, for those where there were any.

    Raises:
        MaskMismatchError: Names or shapes that the model does not have.

    Example:
        >>> import torch
        >>> from lottery_tickets.integrations import compute_filled_zeros
        >>> layer = torch.nn.Linear(2, 2, bias=False)
        >>> mask = {"weight": torch.tensor([[True, False], [False, True]])}
        >>> compute_filled_zeros(layer, mask, remask=True), compute_filled_zeros(layer, mask)
        ({'weight': 2}, {})

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, section 4.1 (the merge).
    """
    bare, ticket, names = beneath_adapters(model, as_mask(mask))
    parameters_of(bare, ticket)
    checks = validate_pruning_correctness(bare, ticket)["tensors"]
    filled = {names[there]: check["not_zero"] for there, check in checks.items() if check["not_zero"]}
    if filled:
        _log.warning(
            "pruned weights are not zero in %d tensors (%s): %s",
            len(filled),
            ", ".join(f"{name}: {count}" for name, count in filled.items()),
            "they are zero again now" if remask else "remask=True makes them zero again",
        )
    if filled and remask:
        apply_mask(bare, ticket)
    return filled


class Beneath(NamedTuple):
    """A model without its adapters.

    Attributes:
        model: What PEFT has wrapped, or the model itself.
        mask: By the names that its parameters have now.
        names: Those, to what they were called before.
    """

    model: nn.Module
    mask: Mask
    names: dict[str, str]


def uncompiled(model: nn.Module) -> nn.Module:
    """The model in whose names masks are, where torch.compile has put one around it."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def beneath_adapters(model: nn.Module, mask: Mask) -> Beneath:
    """The model that PEFT has wrapped, if it has, and the mask for it."""
    base = getattr(model, "get_base_model", None)
    if base is None or not hasattr(model, "peft_config"):
        return Beneath(model, mask, {name: name for name in mask})
    bare: nn.Module = base()
    names = {there: name for name in mask for there in _names_beneath(bare, name)}
    renamed = Mask.from_packed(
        {there: mask.packed(name) for there, name in names.items()},
        {there: mask.shapes[name] for there, name in names.items()},
    )
    return Beneath(bare, renamed, names)


def _names_beneath(model: nn.Module, name: str) -> Iterator[str]:
    """Where PEFT has put a parameter: under a layer with an adapter, or into two copies, one of them trained."""
    path, _, attribute = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:  # a mask of another model: whoever uses the name says so
        yield name
        return
    copies = getattr(module, "modules_to_save", None)
    if isinstance(copies, nn.ModuleDict):
        yield f"{path}.original_module.{attribute}"
        yield from (f"{path}.modules_to_save.{key}.{attribute}" for key in copies)
        return
    while isinstance(below := getattr(module, "base_layer", None), nn.Module):
        module, path = below, f"{path}.base_layer"
    yield f"{path}.{attribute}" if path else attribute
