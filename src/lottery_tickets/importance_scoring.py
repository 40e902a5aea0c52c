"""Importance scores: how much the loss depends on each weight, by every standard criterion.

All functions return float32 scores by canonical parameter name, of the prunable parameters only, larger = more
important; GraSP alone is signed and prunes the largest. The loss L of a sample is the mean over its own units: the
tokens of a sequence that are neither padding nor labelled -100, the elements of a regression target, or its one
label. A sample without units counts for nothing. Samples must not see each other in the model, which holds in
evaluation mode, the mode in which all scores are computed. The model comes back as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypedDict, get_args, overload

import torch
from torch import nn
from torch.distributed import ProcessGroup

from lottery_tickets._batches import LossFunction, batches_of
from lottery_tickets._wanda import compute_wanda_importance
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients import (
    Criterion,
    Options,
    Scored,
    Store,
    add_ranks,
    check_finite,
    compute_grasp_importance,
    compute_scores,
    compute_synflow_importance,
    refuse_folder,
    scorable,
)
from lottery_tickets.masks import Patterns, local_of, reshard, spread_as, together
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.training import joined, lies_in_parts

__all__ = [
    "GradientImportance",
    "ScoreStats",
    "compute_fisher_importance",
    "compute_gradient_importance",
    "compute_gradient_norm_importance",
    "compute_grasp_importance",
    "compute_hybrid_importance",
    "compute_magnitude_importance",
    "compute_obd_importance",
    "compute_snip_importance",
    "compute_synflow_importance",
    "compute_taylor_importance",
    "compute_wanda_importance",
]

Scores = dict[str, torch.Tensor]
GradientImportance = Literal["grad_norm", "taylor", "fisher", "obd", "snip"]
TaylorOrder = Literal["first", "squared"]
FisherKind = Literal["empirical", "true", "batch"]

_CRITERIA: dict[str, Criterion] = {
    "grad_norm": Criterion("absolute"),
    "taylor": Criterion("absolute", power=1),
    "taylor squared": Criterion("square", power=2),
    "fisher": Criterion("square"),
    "fisher true": Criterion("square", drawn=True),
    "fisher batch": Criterion("square", grouping="batch mean"),
    "obd": Criterion("square", power=2, factor=0.5),
    "snip": Criterion("signed", power=1, grouping="batch sum"),
}


class ScoreStats(TypedDict):
    """What scores rest on.

    Attributes:
        num_samples: Samples that had a label, and so a gradient.
        mean_scores: Parameter name to the mean of its scores.
        standard_errors: Parameter name to the standard error of that mean over samples taken as independent
            draws; NaN for criteria that are no means over samples, and for a single sample.
    """

    num_samples: int
    mean_scores: dict[str, float]
    standard_errors: dict[str, float]


@overload
def compute_gradient_importance(
    model: nn.Module,
    dataloader: Any,
    importance_type: GradientImportance = ...,
    num_samples: int | None = ...,
    chunk_size: int | None = ...,
    use_mixed_precision: bool = ...,
    gradient_clip: float | None = ...,
    *,
    loss_fn: LossFunction | None = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    store: Store = ...,
    seed: int = ...,
    checkpoint_activations: bool = ...,
    return_stats: Literal[False] = ...,
    progress: bool = ...,
    check_memory: bool = ...,
    process_group: ProcessGroup | None = ...,
) -> Scores: ...


@overload
def compute_gradient_importance(
    model: nn.Module,
    dataloader: Any,
    importance_type: GradientImportance = ...,
    num_samples: int | None = ...,
    chunk_size: int | None = ...,
    use_mixed_precision: bool = ...,
    gradient_clip: float | None = ...,
    *,
    loss_fn: LossFunction | None = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    store: Store = ...,
    seed: int = ...,
    checkpoint_activations: bool = ...,
    return_stats: Literal[True],
    progress: bool = ...,
    check_memory: bool = ...,
    process_group: ProcessGroup | None = ...,
) -> tuple[Scores, ScoreStats]: ...


def compute_gradient_importance(
    model: nn.Module,
    dataloader: Any,
    importance_type: GradientImportance = "taylor",
    num_samples: int | None = 100,
    chunk_size: int | None = None,
    use_mixed_precision: bool = True,
    gradient_clip: float | None = None,
    *,
    loss_fn: LossFunction | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    store: Store = "cpu",
    seed: int = 0,
    checkpoint_activations: bool = False,
    return_stats: bool = False,
    progress: bool = True,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> Scores | tuple[Scores, ScoreStats]:
    """Scores of weights w from the gradients g_s = dL_s/dw of the losses of n single samples s.

    - "grad_norm": `mean_s |g_s|`
    - "taylor": `mean_s |w g_s|`
    - "fisher": `mean_s g_s^2`
    - "obd": `w^2 / 2 * mean_s g_s^2`
    - "snip": `|w * mean_s g_s|`

    A batch of 8 gives 8 gradients: those of linear and convolution layers are made from the layer's input and the
    gradient of its output inside the backward pass, one matrix product a sample, used at once and forgotten. Where
    that cannot be (other parameters that `include` asked for, layers that are not called as modules, layers whose
    input does not hold a sample a row), samples go through the model one by one.

    Args:
        model: Any module, of any floating-point type, on any device; frozen parameters are scored all the same.
        dataloader: Iterable of batches, or one batch, as `compute_lottery_ticket_quality` takes them.
        importance_type: See above.
        num_samples: Stop after so many samples; None for all.
        chunk_size: Weights scored at a time, at one pass over the data for each chunk (at least one tensor);
            bounds what `store="device"` takes there. Finished chunks go to the CPU. None scores all at once.
        use_mixed_precision: On CUDA devices, compute in bfloat16 by autocast. On the CPU it does nothing: the
            model computes in the type of its weights. Gradients are products in float32 of what the model
            computed, and summed in float32 (float64 beyond 10,000 samples), either way.
        gradient_clip: Largest norm of a sample's gradient over all scored weights; longer ones are scaled down
            to it. Takes a second backward pass, and changes what is estimated.
        loss_fn: `loss_fn(logits, targets)` in place of the loss; best one loss for each sample (or more, in rows),
            as a mean over the batch forces batches of one.
        include: Widens what is scored; see `prunable_parameters`.
        exclude: Narrows it.
        store: Where sums and scores lie: "cpu"; "device", beside the weights; "disk", a mapped temporary file (in
            $TMPDIR) that is gone when the scores are; or a `Path`, a mapped safetensors file that stays.
        seed: Of the order of a dataloader that shuffles, and of drawn labels.
        checkpoint_activations: Keep only what goes in and out of the members of the model's module lists, and
            compute the rest again in the backward pass.
        return_stats: Return a `ScoreStats` too; takes another look at each gradient.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: Ranks with the same weights, each of which goes through batches of its own, any number of
            them (or none) and `num_samples` at most; every rank gets the scores that one would find that saw them
            all, up to rounding in the order of sums. None for this process alone, for the group of a model in
            DistributedDataParallel, or for all ranks of a model that `fully_shard` has cut up. Of that each rank
            gets the scores of its own weights, as DTensors that lie as they do.

    Returns:
        Scores by name, or a pair of them and a `ScoreStats`.

    Raises:
        ScoreError: No samples, a loss or score that is not finite, or an argument out of range.
        BatchError: A batch or a model output of an unknown form.
        ParameterSelectionError: Nothing to score, or a pattern without a match.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: A rank failed or has gone, or a model in parts of another kind.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_gradient_importance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 1.0]]))
        >>> batch = (torch.eye(2), torch.zeros(2, 1))  # L = (w x)^2, so g = 2 (w x) x
        >>> compute_gradient_importance(model, batch, "grad_norm")
        {'weight': tensor([[3., 1.]])}
        >>> compute_gradient_importance(model, batch, "fisher", return_stats=True)[1]["num_samples"]
        2

    References:
        Those of the function of each criterion. Goodfellow, "Efficient Per-Example Gradient Computations", 2015,
        section 4: gradients of single samples from a layer's input and the gradient of its output.
    """
    if importance_type not in get_args(GradientImportance):
        raise ScoreError(f"importance_type is one of {get_args(GradientImportance)}, got {importance_type!r}.")
    options = Options(
        num_samples=num_samples,
        chunk_size=chunk_size,
        use_mixed_precision=use_mixed_precision,
        gradient_clip=gradient_clip,
        loss_fn=loss_fn,
        include=include,
        exclude=exclude,
        store=store,
        seed=seed,
        checkpoint_activations=checkpoint_activations,
        progress=progress,
        check_memory=check_memory,
        process_group=process_group,
    )
    scored = compute_scores(model, dataloader, _CRITERIA[importance_type], options, moments=return_stats)
    return (scored.scores, _stats(scored)) if return_stats else scored.scores


def compute_gradient_norm_importance(model: nn.Module, dataloader: Any, **options: Any) -> Scores:
    """Mean magnitude of the gradient: `mean_s |dL_s/dw|`.

    Args:
        model: See `compute_gradient_importance`.
        dataloader: See there.
        options: Keyword arguments of `compute_gradient_importance` but `importance_type`.

    Returns:
        Scores by name.

    Raises:
        ScoreError: See there, as are the other exceptions.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_gradient_norm_importance
        >>> model = torch.nn.Linear(4, 3)
        >>> scores = compute_gradient_norm_importance(model, (torch.randn(8, 4), torch.randint(3, (8,))))
        >>> scores["weight"].shape
        torch.Size([3, 4])
    """
    return _scores(model, dataloader, "grad_norm", options)


def compute_taylor_importance(
    model: nn.Module, dataloader: Any, *, order: TaylorOrder = "first", **options: Any
) -> Scores:
    """What the loss changes by, to first order, if the weight is removed.

    `mean_s |w dL_s/dw|`, or `mean_s (w dL_s/dw)^2` for `order="squared"`.

    Args:
        model: See `compute_gradient_importance`.
        dataloader: See there.
        order: "first", magnitudes, or "squared", squares.
        options: Keyword arguments of `compute_gradient_importance` but `importance_type`.

    Returns:
        Scores by name.

    Raises:
        ScoreError: See there, as are the other exceptions.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_taylor_importance
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0)
        >>> compute_taylor_importance(model, (torch.ones(1, 1), torch.zeros(1, 1)), order="squared")
        {'weight': tensor([[324.]])}

    References:
        Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equations 3 and 8: the
        squared form is their I^(1), summed over samples; the first-order magnitude is that of Molchanov et al.,
        "Pruning Convolutional Neural Networks for Resource Efficient Inference", ICLR 2017, equation 7.
    """
    _check("order", order, TaylorOrder)
    return _scores(model, dataloader, "taylor" if order == "first" else "taylor squared", options)


def compute_fisher_importance(
    model: nn.Module, dataloader: Any, *, kind: FisherKind = "empirical", **options: Any
) -> Scores:
    """Diagonal of the Fisher information: `mean_s (dL_s/dw)^2`.

    Args:
        model: See `compute_gradient_importance`.
        dataloader: See there.
        kind: "empirical", samples with their own labels. "true", with labels drawn from the model's output:
            classes from its softmax (each token's given the text before it), yes or no from its sigmoid, numbers
            from the normal distribution of variance 1/2 around it, of which squared error is the log-likelihood.
            "batch", the mean over batches of `(mean over the batch of dL_s/dw)^2`: cheap, and smaller than the
            Fisher by about the batch size, since gradients cancel.
        options: Keyword arguments of `compute_gradient_importance` but `importance_type`.

    Returns:
        Scores by name.

    Raises:
        ScoreError: See there, as are the other exceptions; labels cannot be drawn where the model or `loss_fn`
            computes the loss.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_fisher_importance
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> batch = (torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [2.0]]))
        >>> compute_fisher_importance(model, batch), compute_fisher_importance(model, batch, kind="batch")
        ({'weight': tensor([[20.]])}, {'weight': tensor([[16.]])})

    References:
        Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, equation 7. Kunstner
        et al., "Limitations of the empirical Fisher approximation", NeurIPS 2019, equations 2 and 3: true and
        empirical.
    """
    _check("kind", kind, FisherKind)
    return _scores(model, dataloader, "fisher" if kind == "empirical" else f"fisher {kind}", options)


def compute_obd_importance(model: nn.Module, dataloader: Any, **options: Any) -> Scores:
    """Optimal brain damage with the Fisher for the Hessian: `w^2 / 2 * mean_s (dL_s/dw)^2`.

    Args:
        model: See `compute_gradient_importance`.
        dataloader: See there.
        options: Keyword arguments of `compute_gradient_importance` but `importance_type`.

    Returns:
        Scores by name.

    Raises:
        ScoreError: See there, as are the other exceptions.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_obd_importance
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0)
        >>> compute_obd_importance(model, (torch.ones(1, 1), torch.zeros(1, 1)))
        {'weight': tensor([[162.]])}

    References:
        LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989, section 2.2: saliency `h_kk u_k^2 / 2`.
    """
    return _scores(model, dataloader, "obd", options)


def compute_snip_importance(model: nn.Module, dataloader: Any, **options: Any) -> Scores:
    """Connection sensitivity on one large batch, all samples together: `|w * mean_s dL_s/dw|`.

    The paper divides by the sum over all weights, which changes no ranking and is left out. There is no standard
    error: the mean stands inside the magnitude.

    Args:
        model: See `compute_gradient_importance`.
        dataloader: See there; batches add up to one.
        options: Keyword arguments of `compute_gradient_importance` but `importance_type`.

    Returns:
        Scores by name.

    Raises:
        ScoreError: See there, as are the other exceptions.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_snip_importance
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(1.0)
        >>> compute_snip_importance(model, (torch.tensor([[1.0], [-1.0]]), torch.tensor([[0.0], [2.0]])))
        {'weight': tensor([[4.]])}

    References:
        Lee, Ajanthan and Torr, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
        equations 4 and 5.
    """
    return _scores(model, dataloader, "snip", options)


def compute_magnitude_importance(
    model: nn.Module, *, include: Patterns = None, exclude: Patterns = None, check_memory: bool = True
) -> Scores:
    """Magnitude: `|w|`. The scores are a float32 copy; `create_magnitude_mask` needs none.

    Args:
        model: Any module. Of DTensors all ranks make this call, and each gets the scores of its own part.
        include: Widens what is scored; see `prunable_parameters`.
        exclude: Narrows it.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        Scores by name.

    Raises:
        ParameterSelectionError: Nothing to score.
        ScoreError: Weights that are not finite.
        MemoryPlanError: More memory is needed than is free.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_magnitude_importance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> compute_magnitude_importance(model)
        {'weight': tensor([[1., 2.]])}

    References:
        Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NIPS 2015, section 3.
    """
    refuse_folder(model, "scores by magnitude are a copy of the weights, four bytes for each")
    reshard(model)
    with together(model.parameters()):
        refuse_if_too_large("magnitude", model, check=check_memory, include=include, exclude=exclude)
        scores = {}
        for name, parameter in scorable(model, include, exclude).items():
            score = local_of(parameter).detach().to(torch.float32, copy=True).abs_().cpu()
            check_finite(name, score)
            scores[name] = spread_as(parameter, score)
        return scores


def compute_hybrid_importance(
    model: nn.Module,
    dataloader: Any,
    weights: Mapping[str, float],
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    check_memory: bool = True,
    **shared: Any,
) -> Scores:
    """Weighted sum of several criteria's ranks: `sum_c a_c rank_c(w) / N`.

    rank_c is the place of the weight among all N by criterion c, 1 for the least important; equal scores share the
    mean of their places. So the scales of the criteria do not matter, only the factors a_c. Ranks are found by
    counting. One criterion's scores are held at a time. Of more than 2^24 weights, sums of ranks nearer than
    float32 can tell (6e-8 of the largest) are equal.

    Args:
        model: See `compute_gradient_importance`.
        dataloader: See there; gone through once for each criterion that needs data.
        weights: Criterion to its factor a_c, such as `{"magnitude": 0.5, "fisher": 0.5}`: "magnitude",
            "grad_norm", "taylor", "fisher", "obd", "snip", "wanda".
        include: Widens what is scored; see `prunable_parameters`.
        exclude: Narrows it.
        options: Criterion to further keyword arguments of its own function.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        shared: Keyword arguments of every function that needs data: num_samples, seed, progress, process_group.

    Returns:
        Scores by name.

    Raises:
        ScoreError: An unknown criterion, a factor that is not positive, or see the criteria's own functions.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: A rank failed or has gone, or a model in parts of another kind than `fully_shard`'s.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_hybrid_importance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> batch = (torch.tensor([[3.0, 1.0]]), torch.zeros(1, 1))
        >>> compute_hybrid_importance(model, batch, {"magnitude": 1.0, "grad_norm": 0.5})
        {'weight': tensor([[1.0000, 1.2500]])}
    """
    refuse_folder(model, "sums of ranks are of criteria that need the whole model in memory")
    model, everyone = joined(model, shared.pop("process_group", None), "A sum of ranks", sharded=True)
    functions = _functions()
    given = dict(options or {})
    for name, factor in [*weights.items(), *dict.fromkeys(given, 1.0).items()]:
        if name not in functions:
            raise ScoreError(f"{name!r} is no criterion of a hybrid; there are {sorted(functions)}.")
        if not 0 < factor < math.inf:
            raise ScoreError(f"The factor of {name!r} is a positive number, got {factor!r}.")
    if not weights:
        raise ScoreError("weights is empty; give at least one criterion and its factor.")
    batches = dataloader
    if iter(batches_of(batches)) is batches:
        batches = list(batches)
    shared["process_group"] = everyone.group
    with everyone.together():
        # Of the ranks; what each criterion takes beside them it asks for itself.
        refuse_if_too_large("magnitude", model, check=check_memory, include=include, exclude=exclude)
        parameters = scorable(model, include, exclude)
        ranks = {name: torch.zeros(local_of(parameter).shape) for name, parameter in parameters.items()}
        for criterion, factor in weights.items():
            chosen: dict[str, Any] = {"include": include, "exclude": exclude, "check_memory": check_memory}
            chosen |= given.get(criterion, {})
            if criterion == "magnitude":
                scores = compute_magnitude_importance(model, **chosen)
            else:
                scores = functions[criterion](model, batches, **shared, **chosen)
            here = {name: local_of(score) for name, score in scores.items()}
            add_ranks(here, float(factor), ranks, everyone if lies_in_parts(model) else None)
    return {name: spread_as(parameters[name], one) for name, one in ranks.items()}


def _functions() -> dict[str, Callable[..., Scores]]:
    return {
        "magnitude": compute_magnitude_importance,
        "grad_norm": compute_gradient_norm_importance,
        "taylor": compute_taylor_importance,
        "fisher": compute_fisher_importance,
        "obd": compute_obd_importance,
        "snip": compute_snip_importance,
        "wanda": compute_wanda_importance,
    }


def _scores(model: nn.Module, dataloader: Any, criterion: str, given: dict[str, Any]) -> Scores:
    stats = given.pop("return_stats", False)
    scored = compute_scores(model, dataloader, _CRITERIA[criterion], Options(**given), moments=stats)
    return (scored.scores, _stats(scored)) if stats else scored.scores  # type: ignore[return-value]


def _stats(scored: Scored) -> ScoreStats:
    return ScoreStats(
        num_samples=scored.samples,
        mean_scores=scored.means,
        standard_errors={name: moments.standard_error() for name, moments in scored.moments.items()},
    )


def _check(argument: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ScoreError(f"{argument} is one of {get_args(allowed)}, got {value!r}.")
