"""Pruning without data, by what flows through a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lottery_tickets._batches import output_of
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients._flow import linearised, stock_layers
from lottery_tickets.gradients._model import borrowed, refuse_folder
from lottery_tickets.gradients._ranks import add_ranks
from lottery_tickets.gradients._scores import scorable
from lottery_tickets.masks import Patterns, places_of, unpack_range
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.sparsity import Selection
from lottery_tickets.training import joined

_LEAST = torch.finfo(torch.float32).smallest_normal


def compute_synflow_importance(
    model: nn.Module,
    input_shape: Sequence[int] | None = None,
    rounds: int = 100,
    *,
    final_density: float = 0.01,
    include: Patterns = None,
    exclude: Patterns = None,
    progress: bool = True,
    check_memory: bool = True,
) -> dict[str, torch.Tensor]:
    """Order of removal by synaptic flow, without data: iterative, on an exponential schedule.

    In round k = 1 ... n the saliency of every weight still there is `|w| * dR/d|w|`, with R the sum of the outputs
    of the network made linear and positive, on an input of ones; the least salient are removed until the density
    is `final_density^(k / n)`. The score is the weight's place in the order of removal over the number of weights:
    rounds one after the other, inside a round by its saliency, and at the end what the last round left, by its
    saliency in that round. Where a round parts equal ones the earlier go first; equal ones that go together share
    their mean place. So a mask of any sparsity up to 1 - final_density is that of the schedule, and removes in
    rounds in between what it would. Of more than 2^24 weights, places nearer than float32 can tell (6e-8) are
    equal, and go by position.

    The network is made linear so:
    - Layers: weights are their magnitudes, biases are left out.
    - Activation functions are the identity.
    - Embeddings give ones, whatever the tokens: the flow enters after them. Text is one token.
    - Normalisations scale by the magnitude of their weight and divide by a number that is held constant: batch
      norms by their running deviation, others by the root mean square of their input. None centres or shifts.
    - Where activations multiply each other (gates), each is a factor: the product has the value of their geometric
      mean, and a relative change of either is a relative change of the product.
    - Attention gives the mean of the values, and a relative change of a score (query times key) is one of its
      weight: queries and keys carry as much flow as values.

    Args:
        model: Any module of these parts; parameters of any other kind stay as they are.
        input_shape: Of one sample, without the dimension of samples: (3, 32, 32). None for models of transformers
            that take `input_ids`.
        rounds: n. Each costs a forward and a backward pass of one sample and a ranking of all weights.
        final_density: Fraction left by the last round, in (0, 1).
        include: Widens what is scored; see `prunable_parameters`.
        exclude: Narrows it; what is not scored keeps its magnitude.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        Scores by name, in (0, 1].

    Raises:
        ScoreError: A flow that is not finite or nothing, weights it does not reach, or an argument out of range.
        ParameterSelectionError: Nothing to score.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: A model in parts.

    Example:
        >>> import torch
        >>> from lottery_tickets.importance_scoring import compute_synflow_importance
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> compute_synflow_importance(model, (2,))
        {'weight': tensor([[0.5000, 1.0000]])}

    References:
        Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", NeurIPS
        2020, equation 1 and algorithm 1. Its code, too, takes magnitudes of weights and ones for input.
    """
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise ScoreError(f"rounds is a positive integer, got {rounds!r}.")
    if not 0 < final_density < 1:
        raise ScoreError(f"final_density is a fraction in (0, 1), got {final_density!r}.")
    refuse_folder(model, "SynFlow needs backward passes, and these the whole model in memory")
    model, _ = joined(model, None, "SynFlow, whose flow is one of magnitudes in float64 and not of the weights,")
    refuse_if_too_large("synflow", model, check=check_memory, include=include, exclude=exclude)
    parameters = scorable(model, include, exclude)
    kept = {name: torch.ones(one.shape, dtype=torch.bool) for name, one in parameters.items()}
    order = {name: torch.zeros(one.shape) for name, one in parameters.items()}
    total = sum(one.numel() for one in order.values())
    before = 0
    for turn in tqdm(range(1, rounds + 1), desc="flow", unit=" rounds", delay=2, disable=not progress):
        flow = synaptic_flow(model, parameters, kept, input_shape)
        if not any(bool(saliency.any()) for saliency in flow.values()):
            if turn == 1:
                raise ScoreError(f"The flow through {type(model).__name__} is 0: some layer lets none through.")
            break  # so few are left that no path is: none of them comes before another
        removed = total - max(1, round(total * final_density ** (turn / rounds)))
        gone = _least_salient(flow, kept, removed)
        _set_places(order, flow, gone, before, total)
        before = removed
        for name, one in gone.items():
            kept[name] &= ~one
    _set_places(order, flow, kept, before, total)
    return order


def _least_salient(
    flow: Mapping[str, torch.Tensor], kept: Mapping[str, torch.Tensor], removed: int
) -> dict[str, torch.Tensor]:
    """Which weights go so that `removed` are gone in all."""
    for name, saliency in flow.items():
        # Weights that no flow passes rank above those that are gone.
        saliency.clamp_(min=_LEAST).masked_fill_(~kept[name], 0)
    selection = Selection(flow)
    survivors = selection.bits(selection.lines([removed])[0])
    return {
        name: one & ~unpack_range(survivors[name], 0, one.numel()).view(one.shape) for name, one in kept.items()
    }


def _set_places(
    order: Mapping[str, torch.Tensor],
    flow: Mapping[str, torch.Tensor],
    chosen: Mapping[str, torch.Tensor],
    before: int,
    total: int,
) -> None:
    """Place of each chosen weight by its saliency, over the total, so many having gone before."""
    saliencies = {name: flow[name][one] for name, one in chosen.items()}
    places = {name: torch.full_like(one, before / total) for name, one in saliencies.items()}
    add_ranks(saliencies, sum(one.numel() for one in places.values()) / total, places)
    for name, one in chosen.items():
        order[name][one] = places[name]


def synaptic_flow(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, torch.Tensor],
    input_shape: Sequence[int] | None,
) -> dict[str, torch.Tensor]:
    """Saliency `|w| * dR/d|w| / R` of each weight, float32 on the CPU; 1 in all for a layer that all flow passes.

    Zero everywhere if nothing comes through.

    Args:
        model: Any module of known parts.
        parameters: What is scored.
        kept: False where a weight is removed.
        input_shape: Of one sample.
    """
    flow = {name: torch.zeros(one.shape) for name, one in parameters.items()}
    reached: set[str] = set()

    def strength(name: str) -> torch.Tensor:
        weight = parameters[name].detach()
        return weight.double().abs_().mul_(kept[name].to(weight.device))

    def receive(name: str, derivative: torch.Tensor) -> None:
        reached.add(name)
        flow[name] += derivative.mul_(strength(name)).float().cpu()

    names = {id(module): name for name, held in places_of(model, parameters).items() for module, _ in held}
    layers = {layer: names.get(id(layer)) for layer in stock_layers(model)}
    with borrowed(model, checkpoint_activations=False), linearised(model, layers, strength, receive):
        total = output_of(model, _input(model, input_shape)).double().sum()
        if not bool(total.isfinite()):
            raise ScoreError(
                f"The flow through {type(model).__name__} is {total.item()}, more than float64 holds."
            )
        if not total.item() > 0:
            return flow
        torch.autograd.backward(total, 1 / total.detach())
    missing = [name for name in parameters if name not in reached]
    if missing:
        raise ScoreError(f"No flow reaches {', '.join(missing)}; exclude what is not called as a layer.")
    return flow


def _input(model: nn.Module, shape: Sequence[int] | None) -> Any:
    """A sample of ones that the flow can be followed from, or one token."""
    device = next(model.parameters()).device
    if shape is not None:
        return torch.ones(1, *shape, dtype=torch.float64, device=device, requires_grad=True)
    if getattr(model, "main_input_name", None) != "input_ids":
        raise ScoreError("input_shape is needed: the shape of one sample, such as (3, 32, 32).")
    return torch.zeros(1, 1, dtype=torch.int64, device=device)
