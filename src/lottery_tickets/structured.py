"""Structured tickets: channels, heads and neurons that leave whole, and the smaller network without them.

A mask of single weights makes a file smaller and nothing faster. A network from which whole units are gone is a
plain dense network, smaller and faster on anything that runs the first. What belongs to a unit is read off the
graph of the model: the row that makes a neuron and the column that reads it; a channel with its normalisation, its
depthwise convolution and everything that is added to it; a head of keys and values with all its queries; gate, up
and down of a gated layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, overload

from torch import nn

from lottery_tickets._structured._drawing import Drawing, units_of
from lottery_tickets._structured._ranking import Allocation, Count, Rule, Scope
from lottery_tickets._structured._scores import Criterion
from lottery_tickets.masks import Kind, Mask
from lottery_tickets.sparsity import one_or_many

__all__ = ["create_structured_mask"]

_log = logging.getLogger(__name__)


@overload
def create_structured_mask(
    model: nn.Module,
    sparsity: float,
    *,
    unit: Kind = ...,
    criterion: Criterion = ...,
    scope: Scope = ...,
    allocation: Allocation = ...,
    count: Count = ...,
    min_units: int = ...,
    round_to: int | None = ...,
    exclude: str | Sequence[str] = ...,
    example_inputs: Any = ...,
) -> Mask: ...


@overload
def create_structured_mask(
    model: nn.Module,
    sparsity: Sequence[float],
    *,
    unit: Kind = ...,
    criterion: Criterion = ...,
    scope: Scope = ...,
    allocation: Allocation = ...,
    count: Count = ...,
    min_units: int = ...,
    round_to: int | None = ...,
    exclude: str | Sequence[str] = ...,
    example_inputs: Any = ...,
) -> list[Mask]: ...


def create_structured_mask(
    model: nn.Module,
    sparsity: float | Sequence[float],
    *,
    unit: Kind = "channel",
    criterion: Criterion = "magnitude",
    scope: Scope = "global",
    allocation: Allocation = None,
    count: Count = "parameters",
    min_units: int = 1,
    round_to: int | None = None,
    exclude: str | Sequence[str] = (),
    example_inputs: Any = None,
) -> Mask | list[Mask]:
    r"""Mask that removes whole channels, heads or neurons, those that score lowest.

    With a share s of N units or parameters to remove, units leave in the order of their scores, as many as

    $$\text{removed} \le \operatorname{round}(s N)$$

    allows; the next one would pass it. So every mask is contained in those of lower sparsities. Ties are broken by
    position: groups in the order of the model, the earlier unit first. What a unit loses are its weights in every
    tensor, biases and scales of normalisation too: the mask keeps as many parameters as the network will have that
    `extract_subnetwork` makes.

    Which indices leave together is read off the graph that torch.export writes of one forward pass. An operation
    that is not known keeps all that goes into it, so units are never cut wrongly; it costs units at most.

    Args:
        model: Any module that torch.export can trace; its weights are not touched.
        sparsity: Share removed, in [0, 1), or several for a mask each.
        unit: "channel" of convolutions, "head" of attention (of keys and values, with all queries that share it),
            or "neuron", what a linear layer makes and linear layers read.
        criterion: "magnitude", root of the mean square of a unit's weights; "l1", their mean absolute value;
            "bn_scale", the mean absolute scale of the unit's batch normalisation; or scores by parameter name,
            whose sum counts. Biases and scales are no part of "magnitude" and "l1". A weight in a row and a column
            of the same unit counts twice.
        scope: "global", one ranking for all layers, or "layer", each loses the same share of its units.
        allocation: "uniform" is what "layer" does: layers of as many units stay alike, as configurations of
            transformers ask for. {glob: share} names what some groups lose, and the others share the rest.
        count: What `sparsity` is a share of: "units", or "parameters" in all tensors that some unit has a part of.
        min_units: Every layer keeps at least as many.
        round_to: Every layer keeps a multiple of this, as hardware likes it; units go in steps of as many.
        exclude: Globs on the names of groups of units that stay whole.
        example_inputs: What to trace with: a tensor, a tuple of arguments or a mapping of keyword arguments. None
            makes some from the model's configuration or its first linear layer.

    Returns:
        The mask, or a list of masks. `mask.units` says what it is made of.

    Raises:
        StructureError: A model that cannot be traced or has no such units, a criterion that says nothing of some,
            or inputs that are needed and not given.
        SparsityError: A sparsity outside [0, 1) or that cannot be met, or options that contradict each other.
        WeightsError: NaN, or weights on the meta device.

    Example:
        >>> import torch
        >>> from lottery_tickets import create_structured_mask
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> mask = create_structured_mask(model, 0.5, unit="neuron", count="units")
        >>> mask.layer_kept()
        {'0.weight': 64, '0.bias': 8, '2.weight': 16}
        >>> [(group.name, group.kind, group.count) for group in mask.units.groups]
        [('0', 'neuron', 16)]

    References:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, section 3
        ("bn_scale"). You et al., "Drawing Early-Bird Tickets", ICLR 2020, section 3.1. Li et al., "Pruning Filters
        for Efficient ConvNets", ICLR 2017, section 3 ("l1"). Fang et al., "DepGraph: Towards Any Structural
        Pruning", CVPR 2023, section 3 (coupled units).
    """
    rule = Rule(scope, allocation, count, min_units, round_to)
    sparsities, single = one_or_many(sparsity)
    drawing = Drawing(units_of(model, unit, example_inputs, exclude), criterion, rule)
    masks = [drawing.mask(model, kept) for kept in drawing.kept(model, sparsities)]
    for mask in masks:
        _log.info("drawn by %ss: %r", unit, mask)
    return masks[0] if single else masks
