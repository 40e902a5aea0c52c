"""Structured tickets: channels, heads and neurons that leave whole, and the smaller network without them.

A mask of single weights makes a file smaller and nothing faster. A network from which whole units are gone is a
plain dense network, smaller and faster on anything that runs the first. What belongs to a unit is read off the
graph of the model: the row that makes a neuron and the column that reads it; a channel with its normalisation, its
depthwise convolution and everything that is added to it; a head of keys and values with all its queries; gate, up
and down of a gated layer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, overload

import torch
from torch import nn

from lottery_tickets._batches import is_transformers
from lottery_tickets._structured._checking import check_equal
from lottery_tickets._structured._configurations import configured
from lottery_tickets._structured._drawing import Drawing, units_of
from lottery_tickets._structured._extraction import embedded, units_removed, without
from lottery_tickets._structured._inputs import arguments, makes_inputs
from lottery_tickets._structured._onnx import write_onnx
from lottery_tickets._structured._ranking import Allocation, Count, Rule, Scope
from lottery_tickets._structured._scores import Criterion
from lottery_tickets.errors import MaskMismatchError
from lottery_tickets.masks import Kind, Mask, left_of, parameters_of
from lottery_tickets.sparsity import one_or_many

__all__ = ["create_structured_mask", "embed_subnetwork", "extract_subnetwork", "save_onnx"]

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


def extract_subnetwork(
    model: nn.Module,
    mask: Mapping[str, torch.Tensor],
    *,
    example_inputs: Any = None,
    loadable: bool = True,
) -> nn.Module:
    """A plain dense network without the units that a mask removes: smaller, faster, and the same function.

    It gives what the masked model gives, within rounding: sums have the same terms but for the zeros. It is a copy
    of the model's own class, in its modes and on its device, and trains and saves like any other; the model is as
    it was. A transformers model says its new sizes in its configuration, and what its `save_pretrained` writes
    opens with `from_pretrained`. Where such a model keeps other numbers of heads or neurons in each layer, no
    configuration says so: draw the mask with `allocation="uniform"`.

    Args:
        model: The model that the mask was drawn from, or one of the same shape.
        mask: As `create_structured_mask` drew it, or `Mask.load` read it.
        example_inputs: Both are run on these, and their outputs compared; see `create_structured_mask`. None makes
            some where the model tells what it takes, else nothing is run.
        loadable: Refuse a transformers model that its configuration cannot say. False gives it all the same, for
            use at once or export; its own configuration is then wrong about it.

    Returns:
        The smaller network.

    Raises:
        StructureError: A mask of single weights or one that removes a whole layer, a shape that no configuration
            says, or a network that does not compute the same without the units.
        MaskMismatchError: The mask does not fit the model.
        WeightsError: Weights on the meta device.

    Example:
        >>> import torch
        >>> from lottery_tickets import create_structured_mask, extract_subnetwork
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> mask = create_structured_mask(model, 0.75, unit="neuron", count="units")
        >>> extract_subnetwork(model, mask)
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )

    References:
        Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023, section 3. Michel, Levy and Neubig,
        "Are Sixteen Heads Really Better than One?", NeurIPS 2019, section 2 (heads that leave).
    """
    smaller = without(model, mask)
    if loadable and is_transformers(model):
        configured(model, smaller, *units_removed(mask))
    if example_inputs is not None or makes_inputs(model):
        check_equal(model, smaller, mask, arguments(model, example_inputs))
    return smaller


def embed_subnetwork(subnetwork: nn.Module, mask: Mapping[str, torch.Tensor], model: nn.Module) -> None:
    """Put the weights of an extracted network back where they were in the whole one; removed units become zero.

    So a ticket trained on its own is a ticket of the large network again: to compare, to grow, to extract anew.

    Args:
        subnetwork: What `extract_subnetwork` made, trained or not.
        mask: The mask it was made by.
        model: A model of the large shape; all its parameters and buffers are overwritten.

    Raises:
        StructureError: A mask of single weights, or one that removes a whole layer.
        MaskMismatchError: Mask, network and model that do not fit each other.

    Example:
        >>> import torch
        >>> from lottery_tickets import create_structured_mask, embed_subnetwork, extract_subnetwork
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> mask = create_structured_mask(model, 0.5, unit="neuron", count="units")
        >>> small = extract_subnetwork(model, mask)
        >>> embed_subnetwork(small, mask, model)
        >>> torch.equal(model[0].weight != 0, mask["0.weight"])
        True
    """
    units, kept = units_removed(mask)
    parameters_of(model, mask)
    gone = units.gone(kept)
    whole, small = model.state_dict(keep_vars=True), subnetwork.state_dict(keep_vars=True)
    wrong = [
        name
        for name in whole.keys() | small.keys()
        if name not in whole
        or name not in small
        or tuple(small[name].shape) != left_of(whole[name].shape, gone.get(name, {}))
    ]
    if wrong:
        raise MaskMismatchError(
            f"{sorted(wrong)[0]}: the network is not what the mask leaves of the model. Give the mask that it was "
            "extracted by and a model of the shape that it was extracted from."
        )
    for name, tensor in whole.items():
        embedded(tensor, small[name], gone.get(name, {}))


def save_onnx(model: nn.Module, path: str | os.PathLike[str], *, example_inputs: Any = None) -> float:
    """Write a model as one ONNX file, and run that file before it is put in its place.

    The number of samples stays open, and with tokens their number too. Needs the extra `onnx`.

    Args:
        model: Any module, an extracted one for instance, with less than 2 GiB of weights.
        path: Where to; an existing file is replaced.
        example_inputs: See `create_structured_mask`.

    Returns:
        The largest difference between what ONNX Runtime and torch compute, over the largest output.

    Raises:
        StructureError: A model that cannot be exported, is too large for one file, or that ONNX Runtime computes
            otherwise.
        MissingExtraError: The extra is not installed.

    Example:
        >>> import torch
        >>> from lottery_tickets.structured import save_onnx
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> save_onnx(model, "small.onnx") < 1e-5
        True
    """
    error = write_onnx(model, path, arguments(model, example_inputs))
    _log.info("wrote %s; ONNX Runtime is within %.2g", path, error)
    return error
