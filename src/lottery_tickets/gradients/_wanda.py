"""Weights by the size of what they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup
from tqdm import tqdm

from lottery_tickets._batches import kept_positions, run
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients._data import Samples
from lottery_tickets.gradients._layers import add_weight_gradient, input_of, is_convolution, is_stock_layer
from lottery_tickets.gradients._model import borrowed
from lottery_tickets.gradients._scores import scorable
from lottery_tickets.gradients._sums import check_finite
from lottery_tickets.masks import Patterns, places_of
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.training import joined


def compute_wanda_importance(
    model: nn.Module,
    dataloader: Any,
    num_samples: int | None = 128,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    seed: int = 0,
    progress: bool = True,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> dict[str, torch.Tensor]:
    """Weight times activation: `|w_ij| * ||x_j||`, x_j the layer's input feature j over all tokens of all samples.

    For a convolution, x is all that a weight is multiplied with: its input channel at its place in the kernel. A
    layer used several times, or a weight in several layers, takes the norm over all uses. Meant to be compared
    within an output row: `create_importance_mask(scores, sparsity, scope="row")`. Forward passes only.

    Args:
        model: Any module, of any floating-point type.
        dataloader: Iterable of batches, or one batch; labels are not needed. Positions where `attention_mask` is 0
            count for nothing, in layers whose input has one row for each position.
        num_samples: Stop after so many samples; None for all.
        include: Widens what is scored; only weights of layers have an input feature.
        exclude: Narrows it.
        seed: Of the order of a dataloader that shuffles.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: Ranks that go through batches of their own; see `compute_gradient_importance`.

    Returns:
        Scores by name.

    Raises:
        ScoreError: No samples, activations that are not finite, or weights whose layer was not called.
        BatchError: A batch of an unknown form.
        ParameterSelectionError: Nothing to score.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: A rank failed or has gone.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_wanda_importance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> compute_wanda_importance(model, (torch.tensor([[3.0, 1.0], [4.0, 0.0]]), torch.zeros(2, 1)))
        {'weight': tensor([[5., 2.]])}

    References:
        Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024, equation 1.
    """
    model, ranks = joined(model, process_group, "Wanda")
    with ranks.together():
        refuse_if_too_large("wanda", model, dataloader, check=check_memory, include=include, exclude=exclude)
        parameters = scorable(model, include, exclude)
        samples = Samples(dataloader, num_samples, seed=seed, passes=1, may_be_none=ranks.size > 1)
        own = _input_squares(model, parameters, samples, progress and ranks.first)
        squares = _of_all_ranks(own, ranks, next(iter(parameters.values())).device)
        _refuse_missing([name for name in parameters if name not in squares])
        scores = {}
        for name, parameter in parameters.items():
            scores[name] = (parameter.detach().abs().double() * squares.pop(name).sqrt()).float().cpu()
            check_finite(name, scores[name])
        return scores


def _input_squares(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], samples: Samples, progress: bool
) -> dict[str, torch.Tensor]:
    """Name to the sums of squares of what its weights are multiplied with; those not called are left out."""
    places = places_of(model, parameters)
    layers = {
        name: list(dict.fromkeys(module for module, key in held if key == "weight" and is_stock_layer(module)))
        for name, held in places.items()
    }
    squares: dict[str, torch.Tensor] = {}
    padding: list[torch.Tensor | None] = [None]

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            found = _squares(layer, input_of(layer, args, kwargs), output, padding[0])
            squares[name] = squares[name].add_(found) if name in squares else found

        return hook

    with borrowed(model, checkpoint_activations=False), torch.no_grad():
        handles = [
            layer.register_forward_hook(watch(name), with_kwargs=True, prepend=True)
            for name, held in layers.items()
            for layer in held
        ]
        try:
            for batch in tqdm(samples, desc="scoring", unit=" batches", delay=2, disable=not progress):
                padding[0] = kept_positions(model, batch)
                run(model, batch)
        finally:
            for handle in handles:
                handle.remove()
    return squares


def _of_all_ranks(
    squares: Mapping[str, torch.Tensor], ranks: Ranks, device: torch.device
) -> dict[str, torch.Tensor]:
    """The sums over ranks, of which some may not have called a layer."""
    shapes: dict[str, torch.Size] = {}
    for theirs in ranks.gather({name: one.shape for name, one in squares.items()}):
        shapes |= theirs
    sums = {}
    for name in sorted(shapes):
        nothing = torch.zeros(shapes[name] if name not in squares else 0, dtype=torch.float64, device=device)
        sums[name] = squares.get(name, nothing)
        ranks.add_up(sums[name])
    return sums


def _squares(layer: Any, inputs: torch.Tensor, output: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Sum of squares of what each weight is multiplied with, float64, in a shape that fits the weight's."""
    wide = inputs.detach().double().square()
    if is_convolution(layer):
        # The gradient of a weight sums input times output gradient; with ones for the latter, the input.
        total = torch.empty(layer.weight.shape, dtype=torch.float64, device=wide.device)
        add_weight_gradient(layer, wide, torch.ones_like(output, dtype=torch.float64), total, first=True)
        return total
    if kept is not None and inputs.dim() == 3 and inputs.shape[:2] == kept.shape:
        wide = wide * kept[..., None].to(wide)
    features = wide.reshape(-1, wide.shape[-1]).sum(0)
    return features if isinstance(layer, nn.Linear) else features[:, None]


def _refuse_missing(names: Sequence[str]) -> None:
    if names:
        raise ScoreError(
            f"No layer that holds {', '.join(names)} was called, so there is no input to weigh it by: the weight "
            "is used some other way, or these samples do not reach it. Exclude it, or give more samples."
        )
