"""Masks from importance scores: any criterion, spread over layers in any standard way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Literal, get_args, overload

import torch
from torch import nn

from lottery_tickets.errors import MaskMismatchError, ParameterSelectionError, SparsityError, WeightsError
from lottery_tickets.masks import (
    Division,
    Mask,
    Patterns,
    Shard,
    is_sharded,
    local_of,
    parameter_aliases,
    prunable_parameters,
    reshard,
    shard_of,
    together,
)
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.sparsity import (
    Allocation,
    Parts,
    PatternRemainder,
    Ranked,
    Rescore,
    Rule,
    Scope,
    draw_masks,
    extremes,
    layouts_of,
    parts_of,
    warn_of_collapse,
)

_log = logging.getLogger(__name__)

Keep = Literal["largest", "smallest"]


@overload
def create_importance_mask(
    scores: Mapping[str, torch.Tensor],
    sparsity: float | None,
    *,
    scope: Scope = ...,
    allocation: Allocation = ...,
    pattern: str | None = ...,
    pattern_remainder: PatternRemainder = ...,
    min_density: float | None = ...,
    keep: Keep = ...,
    model: nn.Module | None = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    owl_threshold: float = ...,
    owl_lambda: float = ...,
    progress: bool = ...,
    check_memory: bool = ...,
) -> Mask: ...


@overload
def create_importance_mask(
    scores: Mapping[str, torch.Tensor],
    sparsity: Sequence[float],
    *,
    scope: Scope = ...,
    allocation: Allocation = ...,
    pattern: str | None = ...,
    pattern_remainder: PatternRemainder = ...,
    min_density: float | None = ...,
    keep: Keep = ...,
    model: nn.Module | None = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    owl_threshold: float = ...,
    owl_lambda: float = ...,
    progress: bool = ...,
    check_memory: bool = ...,
) -> list[Mask]: ...


def create_importance_mask(
    scores: Mapping[str, torch.Tensor],
    sparsity: float | Sequence[float] | None,
    *,
    scope: Scope = "global",
    allocation: Allocation = None,
    pattern: str | None = None,
    pattern_remainder: PatternRemainder = "error",
    min_density: float | None = None,
    keep: Keep = "largest",
    model: nn.Module | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    owl_threshold: float = 5.0,
    owl_lambda: float = 0.08,
    progress: bool = True,
    check_memory: bool = True,
) -> Mask | list[Mask]:
    r"""Mask that removes the weights with the lowest scores, exactly as many as asked.

    Scores rank by value, not by magnitude: -2 goes before -1. Ties are broken by position, tensors in their order,
    row-major inside a tensor, the earlier weight pruned first. N weights are ranked, and `round(sparsity * N)` go,
    except by `scope="layer"` (`round(sparsity * n)` of each tensor's n) and by a pattern.

    An allocation first settles how many weights each tensor l loses, and each then loses those that rank lowest:

    - "global": one threshold for all scores.
    - "uniform": the same sparsity for every tensor.
    - "erk": density :math:`\epsilon \sum_d n_{l,d} / \prod_d n_{l,d}` over the dimensions of the tensor; those
      that would pass 1 stay dense and the factor is found again for the others.
    - "lamp": one threshold for :math:`s_u^2 / \sum_{v \ge u} s_v^2`, the scores of a tensor sorted ascending.
    - "owl": sparsity :math:`S_l = S - \kappa (D_l - \bar D)`, with D the share of scores above `owl_threshold`
      times the mean of their block and :math:`\kappa` such that the farthest lies `owl_lambda` from S. Blocks are
      the tensors whose names agree up to their first number. Give it :math:`|w| \cdot \|x\|` scores (Wanda's).
    - {glob: sparsity}: as given; tensors that no glob matches take the rest, all at one sparsity.

    Under an allocation, and by `scope="row"`, each tensor keeps at least one weight, and what rounding leaves over
    goes to the tensors with the largest remainders. For this the number that a tensor loses may fall by one as the
    sparsity rises by less than a weight of that tensor, and masks so close are nested but for that weight; others
    are, and those of "lamp", "global", `scope="layer"` and single tensors always.

    Where scores are DTensors, or the model's parameters are (FSDP2, tensor parallelism), all ranks make this call.
    Each ranks what it holds and gets a `ShardedMask` with the bits of its own weights; together they are those of
    the scores in one piece.

    Args:
        scores: Canonical parameter name to scores in the parameter's shape, on any device. Larger is more
            important. With a model in parts: DTensors that lie as its parameters do, plain tensors of this rank's
            part of each, or the same whole ones on every rank.
        sparsity: Fraction removed, in [0, 1). A list gives one mask each. With a pattern it is the pattern's, or
            None.
        scope: "global", one threshold; "layer", one per tensor; "row", one per output row (Wanda's comparison
            group), every row of a tensor losing as many to a weight. "row" goes with an allocation too.
        allocation: None for the scope alone, or a rule from above.
        pattern: "N:M", N weights kept of every M consecutive ones along the input dimension: of convolutions, M
            consecutive input channels at each place of the kernel.
        pattern_remainder: "error" refuses tensors whose inputs M does not divide, "dense" keeps them whole.
        min_density: Every tensor keeps at least this share under a threshold; the total stays exact.
        keep: "smallest" removes the largest scores instead (GraSP's).
        model: The scored model. It tells which scores there must be, and which way round each layer stores its
            weight. Without it all scores are ranked, and dimension 1 of each is taken for its inputs, which is
            wrong for transposed convolutions and transformers' `Conv1D` under a pattern or `scope="row"`.
        include: With a model, widens what is pruned; see `prunable_parameters`.
        exclude: Narrows it.
        owl_threshold: M of OWL.
        owl_lambda: Lambda of OWL.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        The mask, or a list of masks for a list of sparsities.

    Raises:
        SparsityError: A sparsity outside [0, 1) or that cannot be met, a pattern that does not divide a tensor, or
            a scope, allocation, pattern and floor of which two contradict each other.
        WeightsError: No scores, NaN (named with its tensor and count), or a data type that cannot be ranked.
        MaskMismatchError: Scores that are missing, of tensors the model does not have, or of another shape.
        ParameterSelectionError: A pattern of names that matches nothing, or one without a model.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: Another rank failed, has gone, or was given something else.

    Warns:
        LayerCollapseWarning: A global threshold removed every weight of a tensor.

    Example:
        >>> import torch
        >>> from lottery_tickets import create_importance_mask
        >>> scores = {"fc.weight": torch.tensor([[0.1, -0.5, 3.0, 0.2], [5.0, 7.0, 6.0, 8.0]])}
        >>> create_importance_mask(scores, 0.5)["fc.weight"]
        tensor([[False, False, False, False],
                [ True,  True,  True,  True]])
        >>> create_importance_mask(scores, 0.5, scope="row")["fc.weight"]
        tensor([[False, False,  True,  True],
                [False,  True, False,  True]])
        >>> create_importance_mask(scores, None, pattern="2:4").sparsity
        0.5

    References:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3 (ERK).
        Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021: the LAMP score.
        Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024: layerwise outlier distribution.
        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024: rows.
        Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021: N:M.
    """
    rule = Rule(scope, allocation, pattern, pattern_remainder, min_density, owl_threshold, owl_lambda)
    if keep not in get_args(Keep):
        raise SparsityError(f"keep is 'largest' or 'smallest', which scores stay; got {keep!r}.")
    number = len(sparsity) if isinstance(sparsity, Sequence) else 1
    with _together(scores, model):
        chosen = _chosen(scores, model, include, exclude)
        layouts = layouts_of(model, prunable_parameters(model, include, exclude)) if model is not None else {}
        parts = _parts(chosen, model)
        refuse_if_too_large("mask", parts["tensors"], check=check_memory, masks=max(1, number))
        ranked = Ranked(**parts, layouts=layouts, progress="ranking scores" if progress else None)
        masks, single = draw_masks(_ordered(ranked, keep, allocation), sparsity, rule)
    for mask in masks:
        _log.info("drawn by scores, %s: %r", rule, mask)
    if rule.by_threshold:
        warn_of_collapse(masks)
    return masks[0] if single else masks


def _chosen(
    scores: Mapping[str, torch.Tensor], model: nn.Module | None, include: Patterns, exclude: Patterns
) -> dict[str, torch.Tensor]:
    """The scores to rank: all, or those of the model's prunable parameters in the model's order."""
    if not scores:
        raise WeightsError("scores is empty: expected a dict from parameter names to tensors of scores.")
    if model is None:
        if include is not None or exclude is not None:
            raise ParameterSelectionError(
                "include and exclude choose among a model's parameters; pass model=, or fewer scores."
            )
        return dict(scores)
    names = list(prunable_parameters(model, include, exclude))
    missing = [name for name in names if name not in scores]
    if missing:
        raise MaskMismatchError(
            f"No scores for {', '.join(missing)} of {type(model).__name__}. Score them, or pass exclude= for what "
            "is to stay dense."
        )
    canonical = {alias: aliases[0] for aliases in parameter_aliases(model).values() for alias in aliases}
    parameters = dict(model.named_parameters())
    parts = {name: local_of(parameter).shape for name, parameter in parameters.items()}
    problems = []
    for name, score in scores.items():
        if name not in canonical:
            problems.append(f"{name}: the model has no such parameter")
        elif canonical[name] != name:
            problems.append(f"{name}: tied to {canonical[name]}, which is the name to use")
        elif isinstance(score, torch.Tensor) and score.shape not in (parameters[name].shape, parts[name]):
            problems.append(f"{name}: scores {tuple(score.shape)}, parameter {tuple(parameters[name].shape)}")
    if problems:
        raise MaskMismatchError(
            f"The scores do not fit {type(model).__name__}: {'; '.join(problems)}. Score this model, or pass the "
            "one that was scored."
        )
    return {name: scores[name] for name in names}


def _together(scores: Mapping[str, torch.Tensor], model: nn.Module | None) -> AbstractContextManager[None]:
    """A block in which an error on one rank is one on all, if scores or weights lie in parts on ranks."""
    if model is None:
        return together(scores.values())
    reshard(model)
    return together([*model.parameters(), *scores.values()])


def _parts(scores: Mapping[str, torch.Tensor], model: nn.Module | None) -> Parts:
    """What this rank has to rank, and how it is spread: as the model is, or as the scores say themselves."""
    parameters = dict(model.named_parameters()) if model is not None else {}
    parameters = {name: parameters[name] for name in scores if name in parameters}
    if not any(is_sharded(parameter) for parameter in parameters.values()):
        return parts_of(scores)
    division = Division.of(parameters)
    assert division is not None
    tensors = {name: _part(name, score, division.shards[name]) for name, score in scores.items()}
    return Parts(tensors=tensors, division=division)


def _part(name: str, score: torch.Tensor, shard: Shard) -> torch.Tensor:
    """This rank's part of scores that lie as the weights do, or are the same whole ones on every rank."""
    if is_sharded(score):
        if not shard_of(name, score).is_at(shard):
            raise MaskMismatchError(
                f"{name}: the scores are sharded in another way than the weights. score.redistribute(mesh, "
                "placements) with those of the parameter brings them together."
            )
        return local_of(score)
    if not isinstance(score, torch.Tensor) or score.shape == shard.part:
        return score
    return shard.take(score)


def _ordered(ranked: Ranked, keep: Keep, allocation: Allocation) -> Ranked:
    """The scores, ranking by value in the direction that is asked for."""
    if ranked.division is not None:
        ranked.division.ranks.check_asked_alike(f"keep={keep!r}")
    ends = extremes(ranked.tensors, division=ranked.division)
    signed = [name for name, (low, _) in ends.items() if low < 0]
    if allocation in ("lamp", "owl") and (signed or keep == "smallest"):
        what = f"negative scores ({', '.join(signed)})" if signed else "keep='smallest'"
        raise SparsityError(
            f"allocation={allocation!r} weighs scores as sizes, and means nothing with {what}. Choose another "
            "allocation, or scores that are not negative and rank upwards."
        )
    rescore, dtype = _order(ranked.tensors, keep, signed=bool(signed))
    return replace(ranked, rescore=rescore, dtype=dtype)


def _order(
    scores: Mapping[str, torch.Tensor], keep: Keep, *, signed: bool
) -> tuple[Rescore | None, torch.dtype | None]:
    """What ranks as the scores do when its sign is dropped; None where the scores themselves do."""
    if keep == "largest" and not signed:
        return None, None
    wide = [name for name, tensor in scores.items() if tensor.dtype == torch.float64]
    if wide:
        raise WeightsError(
            "Negative scores, and those ranked downwards, are ranked by their 32 bits; float64 in "
            f"{', '.join(wide)}. Pass scores.float()."
        )
    direction = 1 if keep == "largest" else -1

    def rescore(name: str, values: torch.Tensor) -> torch.Tensor:
        # The patterns of floating-point numbers rank as the numbers do up to the sign; float64 holds them exactly.
        patterns = values.float().contiguous().view(torch.int32).long()
        magnitudes = patterns & 0x7FFFFFFF
        ordered = torch.where(patterns < 0, -magnitudes, magnitudes)
        return (direction * ordered + (1 << 31)).double()

    return rescore, torch.float64
