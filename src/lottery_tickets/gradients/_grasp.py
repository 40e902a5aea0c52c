"""Which weights carry the gradient's flow: one Hessian-vector product."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from lottery_tickets._batches import LossFunction, measure, samples_of, size_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients._data import Samples
from lottery_tickets.gradients._model import borrowed, differentiated, refuse_folder, widened
from lottery_tickets.gradients._passes import Gradients
from lottery_tickets.gradients._scores import scorable
from lottery_tickets.gradients._sums import Sums, check_finite
from lottery_tickets.gradients._together import Together
from lottery_tickets.masks import Patterns, places_of
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.training import joined


def compute_grasp_importance(
    model: nn.Module,
    dataloader: Any,
    num_samples: int | None = 100,
    *,
    loss_fn: LossFunction | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    seed: int = 0,
    progress: bool = True,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> dict[str, torch.Tensor]:
    """Gradient signal preservation: `-w * (H g)`, with g and H the gradient and the Hessian of the mean loss.

    Removing a weight changes the squared norm of the gradient by about twice its score, so the paper removes the
    largest: `create_importance_mask(scores, sparsity, keep="smallest")`. Scores are signed. H and g are over the
    prunable parameters that are scored. Two passes over the data, the second of which differentiates twice and
    holds two gradients of the scored weights besides its batch's graph; attention goes by its plain formula, whose
    second derivative is known. The paper's code divides logits by a temperature of 200, its formula does not;
    `loss_fn` can.

    Args:
        model: Any module. Weights in bfloat16 and float16 are lent in float32 for the time (4 bytes a weight
            more): rounded derivatives of derivatives would be worth little.
        dataloader: See `compute_gradient_importance`; the mean is over all samples.
        num_samples: Stop after so many samples; None for all.
        loss_fn: See there; it has to be twice differentiable.
        include: Widens what is scored; see `prunable_parameters`.
        exclude: Narrows it.
        seed: Of the order of a dataloader that shuffles.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: Ranks that go through batches of their own; see `compute_gradient_importance`.

    Returns:
        Scores by name, signed.

    Raises:
        ScoreError: No samples, or a loss or score that is not finite.
        BatchError: A batch or a model output of an unknown form.
        ParameterSelectionError: Nothing to score.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: A rank failed or has gone.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_grasp_importance
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0)
        >>> compute_grasp_importance(model, (torch.ones(1, 1), torch.zeros(1, 1)))  # L = w^2, g = 2 w, H = 2
        {'weight': tensor([[-36.]])}

    References:
        Wang, Zhang and Grosse, "Picking Winning Tickets Before Training by Preserving Gradient Flow", ICLR 2020,
        equation 8 and algorithm 2.
    """
    refuse_folder(model, "GraSP needs backward passes, and these the whole model in memory")
    model, ranks = joined(model, process_group, "GraSP, which differentiates twice,")
    with ranks.together():
        refuse_if_too_large("grasp", model, dataloader, check=check_memory, include=include, exclude=exclude)
        parameters = scorable(model, include, exclude)
        samples = Samples(dataloader, num_samples, seed=seed, passes=2, may_be_none=ranks.size > 1)
        scores = _products(model, parameters, samples, loss_fn, ranks, bars=progress and ranks.first)
        for name, parameter in parameters.items():
            scores[name].mul_(parameter.detach().to(scores[name])).neg_()
            check_finite(name, scores[name])
        return scores


def _products(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    samples: Samples,
    loss_fn: LossFunction | None,
    ranks: Ranks,
    *,
    bars: bool,
) -> dict[str, torch.Tensor]:
    """The mean loss's Hessian times its gradient."""
    places = places_of(model, parameters)
    with borrowed(model, checkpoint_activations=False), widened(model), sdpa_kernel(SDPBackend.MATH):
        bar = tqdm(samples, desc="gradient", unit=" batches", delay=2, disable=not bars)
        sums = Sums(parameters, ["signed"], "device", ranks=ranks)
        gradients = Gradients(model, places, grouping="batch sum", loss_fn=loss_fn, together=Together(ranks))
        count = gradients.go_through(bar, list(parameters), sums)["samples"]
        mean = sums.finish("signed", count, lambda _name, _mean: None)
        objects = {
            name: list(
                {id(one): one for module, key in held if (one := module._parameters[key]) is not None}.values()
            )
            for name, held in places.items()
        }
        products = Sums(parameters, ["signed"], "cpu", ranks=ranks)
        with differentiated(one for ones in objects.values() for one in ones):
            for batch in tqdm(samples, desc="curvature", unit=" batches", delay=2, disable=not bars):
                for loss in _losses(model, batch, loss_fn):
                    for name, product in _hessian_product(loss, objects, mean).items():
                        products.receive(name, 0, product)
    return products.finish("signed", count, lambda _name, _mean: None)


def _losses(model: nn.Module, batch: Any, loss_fn: LossFunction | None) -> list[torch.Tensor]:
    """Sums of sample losses: one of the whole batch, or where that is not known by sample, one of each."""
    rows = measure(model, batch, loss_fn=loss_fn).rows
    if rows is not None:
        return [rows.losses.sum()]
    if size_of(batch) == 1:
        return []
    return [
        one for row in range(size_of(batch)) for one in _losses(model, samples_of(batch, row, row + 1), loss_fn)
    ]


def _hessian_product(
    loss: torch.Tensor, objects: Mapping[str, Sequence[nn.Parameter]], vector: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The loss's Hessian times the vector, float32; parameters that it does not reach are left out."""
    listed = [(name, one) for name, ones in objects.items() for one in ones]
    parameters = [one for _, one in listed]
    first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    terms = [
        (gradient.float() * vector[name]).sum()
        for (name, _), gradient in zip(listed, first, strict=True)
        if gradient is not None and gradient.requires_grad
    ]
    if not terms:
        return {}
    try:
        second = torch.autograd.grad(torch.stack(terms).sum(), parameters, allow_unused=True)
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        raise ScoreError(f"GraSP differentiates twice, and this model cannot: {error}") from error
    products: dict[str, torch.Tensor] = {}
    for (name, _), one in zip(listed, second, strict=True):
        if one is not None:
            products[name] = products[name] + one.float() if name in products else one.float()
    return products
