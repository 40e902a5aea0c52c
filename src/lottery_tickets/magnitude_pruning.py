"""Magnitude pruning: masks that keep the largest weights, and how a network bears it."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import TypedDict, overload

import torch
from torch import nn

from lottery_tickets.errors import ParameterSelectionError, SparsityError
from lottery_tickets.large_models import map_weights, resolve_model
from lottery_tickets.masks import Mask, Patterns, prunable_parameters, reshard, together
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.sparsity import (
    Allocation,
    NanPolicy,
    PatternRemainder,
    Ranked,
    Rescore,
    Rule,
    Scope,
    check_sparsity,
    draw_masks,
    layouts_of,
    parts_of,
    removals_by_weight,
    removed_count,
    warn_of_collapse,
)

_log = logging.getLogger(__name__)
_COUNTING = "counting weights"


class LayerwiseTicket(TypedDict):
    """What `compute_layerwise_magnitude_ticket` returns.

    Attributes:
        masks: The ticket.
        layer_sparsities: Parameter name to the fraction removed.
        overall_sparsity: Fraction removed over all tensors.
        method: "global" or "layer", with "_weighted" behind it if importance weights were given.
        threshold: The largest pruned magnitude: one number under global ranking (of the weighted magnitudes if
            weights were given), one per parameter name otherwise.
    """

    masks: Mask
    layer_sparsities: dict[str, float]
    overall_sparsity: float
    method: str
    threshold: float | dict[str, float]


@overload
def create_magnitude_mask(
    model: nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    sparsity: float | None,
    use_histogram: bool = True,
    *,
    scope: Scope = ...,
    allocation: Allocation = ...,
    pattern: str | None = ...,
    pattern_remainder: PatternRemainder = ...,
    owl_threshold: float = ...,
    owl_lambda: float = ...,
    only_weights: bool = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    min_density: float | None = ...,
    nan: NanPolicy = ...,
    progress: bool = ...,
    check_memory: bool = ...,
) -> Mask: ...


@overload
def create_magnitude_mask(
    model: nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    sparsity: Sequence[float],
    use_histogram: bool = True,
    *,
    scope: Scope = ...,
    allocation: Allocation = ...,
    pattern: str | None = ...,
    pattern_remainder: PatternRemainder = ...,
    owl_threshold: float = ...,
    owl_lambda: float = ...,
    only_weights: bool = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    min_density: float | None = ...,
    nan: NanPolicy = ...,
    progress: bool = ...,
    check_memory: bool = ...,
) -> list[Mask]: ...


def create_magnitude_mask(
    model: nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
    sparsity: float | Sequence[float] | None,
    use_histogram: bool = True,
    *,
    scope: Scope = "global",
    allocation: Allocation = None,
    pattern: str | None = None,
    pattern_remainder: PatternRemainder = "error",
    owl_threshold: float = 5.0,
    owl_lambda: float = 0.08,
    only_weights: bool = True,
    include: Patterns = None,
    exclude: Patterns = None,
    min_density: float | None = None,
    nan: NanPolicy = "raise",
    progress: bool = True,
    check_memory: bool = True,
) -> Mask | list[Mask]:
    """Mask that removes exactly the `round(sparsity * N)` smallest magnitudes of N weights.

    The threshold is found by counting bit patterns: exact at any size, in memory that does not grow with the
    model beyond the mask's N / 8 bytes. Ties at it are broken by position, tensors in the order of the model,
    row-major inside a tensor, the earlier weight pruned first. Data types may differ between tensors; magnitudes
    are compared by value, inf is the largest, and -0.0 equals 0.0.

    Where parameters are DTensors (FSDP2, tensor parallelism), all ranks make this call. Each counts what it holds
    and gets a `ShardedMask` with the bits of its own weights; together they are those of the model in one piece.

    Args:
        model: A model, or a mapping from names to tensors of weights (then all of them are ranked).
        sparsity: Fraction removed, in [0, 1). A list gives one mask each, from the same counts, and the masks
            are nested: what a lower sparsity prunes a higher one prunes too (allocations say where to a weight).
            With a pattern it is the pattern's, or None.
        use_histogram: False sorts all magnitudes under a threshold instead: the same bits, more time and 20 bytes
            a weight.
        scope: "global", one threshold for all tensors together; "layer", one per tensor, which then loses
            `round(sparsity * n)` of its n weights; or "row", one per output row, the total exact and rows of a
            tensor alike to a weight.
        allocation: How many weights each tensor loses: "global" (one threshold), "uniform", "erk", "lamp", "owl",
            or {glob: sparsity}, the tensors that no glob matches taking the rest. See `create_importance_mask`.
        pattern: "N:M", N weights kept of every M consecutive ones along the input dimension.
        pattern_remainder: "error" refuses tensors whose inputs M does not divide, "dense" keeps them whole.
        owl_threshold: M of OWL: an outlier's magnitude is above M times the mean of its block.
        owl_lambda: The farthest that OWL moves a tensor's sparsity from the mean.
        only_weights: If False, the biases of the same layers are ranked with the weights.
        include: Widens what is prunable; see `prunable_parameters`.
        exclude: Narrows it.
        min_density: Every tensor keeps at least this share of its weights; the total stays exact.
        nan: "raise" refuses NaN weights, "prune" ranks them below all others.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        The mask, or a list of masks for a list of sparsities.

    Raises:
        SparsityError: A sparsity outside [0, 1) or that cannot be met, a pattern that does not divide a tensor, or
            a scope, allocation, pattern and floor of which two contradict each other.
        WeightsError: NaN (named with its tensor and count), meta tensors, a data type without magnitudes.
        ParameterSelectionError: A pattern that matches nothing.
        MemoryPlanError: More memory is needed than is free.
        CheckpointError: A checkpoint that `map_weights` refuses.
        DistributedError: Another rank failed, has gone, or was given something else.

    Warns:
        LayerCollapseWarning: A global threshold removed every weight of a tensor.

    Example:
        >>> import torch
        >>> from lottery_tickets import create_magnitude_mask
        >>> weights = {"fc.weight": torch.tensor([[0.1, -0.5], [0.3, -0.2]])}
        >>> create_magnitude_mask(weights, 0.5)["fc.weight"]
        tensor([[False,  True],
                [ True, False]])
        >>> [mask.kept for mask in create_magnitude_mask(weights, [0.25, 0.75])]
        [3, 1]

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 2 (layer-wise) and section 4
        (global pruning).
    """
    rule = Rule(scope, allocation, pattern, pattern_remainder, min_density, owl_threshold, owl_lambda)
    number = max(1, len(sparsity)) if isinstance(sparsity, Sequence) else 1
    ask = partial(refuse_if_too_large, "mask", check=check_memory, masks=number, use_histogram=use_histogram)
    label = _COUNTING if progress else None
    ranked = partial(Ranked, nan=nan, use_histogram=use_histogram, progress=label)
    if isinstance(model, (str, os.PathLike)):
        with map_weights(resolve_model(model), include, exclude, only_weights=only_weights) as weights:
            ask(weights.tensors, from_disk=True)
            if rule.pattern is not None or rule.scope == "row":
                weights.check_layouts()
            masks, single = draw_masks(
                ranked(weights.tensors, weights.layouts, pages=weights.pages), sparsity, rule
            )
    else:
        with _together(model):
            tensors = _ranked_tensors(model, include, exclude, only_weights=only_weights)
            layouts = layouts_of(model, tensors) if isinstance(model, nn.Module) else {}
            divided = ranked(**parts_of(tensors), layouts=layouts)
            ask(divided.tensors)
            masks, single = draw_masks(divided, sparsity, rule)
    for mask in masks:
        _log.info("drawn by magnitude, %s: %r", rule, mask)
    if rule.by_threshold:
        warn_of_collapse(masks)
    return masks[0] if single else masks


def compute_layerwise_magnitude_ticket(
    model: nn.Module | Mapping[str, torch.Tensor],
    target_sparsity: float = 0.9,
    use_global_ranking: bool = True,
    layer_importance_weights: Mapping[str, float] | None = None,
    *,
    progress: bool = True,
    check_memory: bool = True,
) -> LayerwiseTicket:
    """Magnitude ticket with its sparsity layer by layer, some layers spared more than others if asked.

    Under global ranking a weight w of layer l ranks by `c_l * |w|`, computed in float64, so layers with a larger
    importance c_l keep more. Otherwise each layer is ranked by itself and its density is proportional to c_l,
    capped at 1. Either way `round(target_sparsity * N)` weights go.

    Args:
        model: A model, or a mapping from names to tensors of weights.
        target_sparsity: Fraction of all ranked weights removed, in [0, 1).
        use_global_ranking: One threshold for all layers, or one per layer.
        layer_importance_weights: Parameter or module name to a positive finite number; layers not named have 1.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        A `LayerwiseTicket`.

    Raises:
        SparsityError: A sparsity outside [0, 1), an unknown layer, or an importance that is not positive.
        WeightsError: NaN, meta tensors, or a data type without magnitudes.
        MemoryPlanError: More memory is needed than is free.

    Warns:
        LayerCollapseWarning: A global threshold removed every weight of a tensor.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_layerwise_magnitude_ticket
        >>> weights = {"a": torch.tensor([1.0, 2.0, 3.0, 3.5]), "b": torch.tensor([2.5, 4.0, 5.0, 6.0])}
        >>> compute_layerwise_magnitude_ticket(weights, 0.5)["layer_sparsities"]
        {'a': 0.75, 'b': 0.25}
        >>> ticket = compute_layerwise_magnitude_ticket(weights, 0.5, layer_importance_weights={"a": 2.0})
        >>> ticket["layer_sparsities"], ticket["threshold"]
        ({'a': 0.5, 'b': 0.5}, 4.0)

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, sections 2 and 4.
    """
    check_sparsity(target_sparsity, "target_sparsity")
    with _together(model):
        tensors = _ranked_tensors(model, None, None, only_weights=True)
        importance = _importance(tensors, layer_importance_weights or {})
        numels = {name: tensor.numel() for name, tensor in tensors.items()}
        removed = removed_count(target_sparsity, sum(numels.values()))
        weighted = bool(layer_importance_weights)
        ranked = Ranked(**parts_of(tensors), progress=_COUNTING if progress else None)
        threshold: float | dict[str, float]
        with ranked.together(f"{target_sparsity}, {use_global_ranking}, {importance}"):
            refuse_if_too_large("mask", ranked.tensors, check=check_memory)
            if use_global_ranking:
                if weighted:
                    ranked = replace(ranked, rescore=_scaled_by(importance), dtype=torch.float64)
                selector = ranked.selector(tensors)
                (line,) = selector.lines([removed])
                threshold, bits = line.threshold, selector.bits(line)
            else:
                removals = removals_by_weight(numels, importance, removed)
                threshold, bits = {}, {}
                for name in tensors:
                    selector = ranked.selector([name])
                    (line,) = selector.lines([removals[name]])
                    threshold[name] = line.threshold
                    bits |= selector.bits(line)
            mask = ranked.mask(bits)
    if use_global_ranking:
        warn_of_collapse([mask])
    return LayerwiseTicket(
        masks=mask,
        layer_sparsities=mask.layer_sparsity(),
        overall_sparsity=mask.sparsity,
        method=("global" if use_global_ranking else "layer") + ("_weighted" if weighted else ""),
        threshold=threshold,
    )


def _ranked_tensors(
    model: nn.Module | Mapping[str, torch.Tensor], include: Patterns, exclude: Patterns, *, only_weights: bool
) -> Mapping[str, torch.Tensor]:
    if isinstance(model, nn.Module):
        return prunable_parameters(model, include, exclude, only_weights=only_weights)
    if include is not None or exclude is not None:
        raise ParameterSelectionError(
            "include and exclude choose among a model's parameters; of a mapping every tensor is ranked."
        )
    return dict(model)


def _together(model: nn.Module | Mapping[str, torch.Tensor]) -> AbstractContextManager[None]:
    """A block in which an error on one rank is one on all, if weights lie in parts on ranks."""
    if isinstance(model, nn.Module):
        reshard(model)
        return together(model.parameters())
    return together(dict(model).values())


def _importance(tensors: Mapping[str, torch.Tensor], given: Mapping[str, float]) -> dict[str, float]:
    """Importance per tensor; a layer may be named by its parameter or by its module."""
    importance = dict.fromkeys(tensors, 1.0)
    for layer, weight in given.items():
        names = [name for name in tensors if name == layer or name.rpartition(".")[0] == layer]
        if not names:
            raise SparsityError(
                f"layer_importance_weights: no prunable layer is called {layer!r}; names look like "
                f"{next(iter(tensors), 'nothing')!r}."
            )
        if not (isinstance(weight, Real) and math.isfinite(weight) and weight > 0):
            raise SparsityError(
                f"layer_importance_weights[{layer!r}]: expected a positive number, got {weight!r}."
            )
        importance |= dict.fromkeys(names, float(weight))
    return importance


def _scaled_by(importance: Mapping[str, float]) -> Rescore:
    def rescore(name: str, weights: torch.Tensor) -> torch.Tensor:
        return weights.double().abs() * importance[name]

    return rescore
