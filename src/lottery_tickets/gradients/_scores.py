"""Scores that are a power of the weight times a mean over gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed import ProcessGroup
from tqdm import tqdm

from lottery_tickets._batches import LossFunction
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients._data import Samples
from lottery_tickets.gradients._model import borrowed, refuse_folder
from lottery_tickets.gradients._passes import Gradients, Grouping
from lottery_tickets.gradients._stores import Store, write_whole
from lottery_tickets.gradients._sums import Moments, Statistic, Sums, SumsInParts
from lottery_tickets.gradients._together import InStep, Together, refuse_other_parts
from lottery_tickets.masks import (
    Division,
    Patterns,
    Shard,
    is_sharded,
    local_of,
    places_of,
    prunable_parameters,
    spread_as,
)
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.training import joined


@dataclass(frozen=True)
class Criterion:
    """The score `factor * |w|^power * |mean of f(gradient)|`.

    Attributes:
        statistic: f: the gradient itself, its magnitude or its square.
        power: Of the weight's magnitude: 0, 1 or 2.
        factor: A plain number.
        grouping: What the gradients are of; see `Gradients`.
        drawn: Labels are drawn from the model's own output.
    """

    statistic: Statistic
    power: int = 0
    factor: float = 1.0
    grouping: Grouping = "sample"
    drawn: bool = False

    def finish(self, weight_of: Callable[[str], torch.Tensor], name: str, mean: torch.Tensor) -> None:
        """The score of one parameter, in place of its mean."""
        mean.abs_()
        for _ in range(self.power):
            mean.mul_(weight_of(name).detach().abs().to(mean))
        if self.factor != 1:
            mean.mul_(self.factor)

    def summary(self, weight_of: Callable[[str], torch.Tensor], name: str, gradient: torch.Tensor) -> float:
        """Mean over a parameter of the score that one gradient alone would give it."""
        score = gradient.square() if self.statistic == "square" else gradient.abs()
        self.finish(weight_of, name, score)
        return float(score.mean(dtype=torch.float64))


@dataclass(frozen=True)
class Options:
    """What does not depend on the criterion; see `compute_gradient_importance`."""

    num_samples: int | None = 100
    chunk_size: int | None = None
    use_mixed_precision: bool = True
    gradient_clip: float | None = None
    loss_fn: LossFunction | None = None
    include: Patterns = None
    exclude: Patterns = None
    store: Store = "cpu"
    seed: int = 0
    checkpoint_activations: bool = False
    progress: bool = True
    check_memory: bool = True
    process_group: ProcessGroup | None = None

    def __post_init__(self) -> None:
        if self.chunk_size is not None and (not isinstance(self.chunk_size, int) or self.chunk_size < 1):
            raise ScoreError(f"chunk_size is a positive number of weights or None, got {self.chunk_size!r}.")
        if self.gradient_clip is not None and not 0 < self.gradient_clip < math.inf:
            raise ScoreError(f"gradient_clip is a positive norm or None, got {self.gradient_clip!r}.")


class Scored(NamedTuple):
    """Scores, and what they rest on."""

    scores: dict[str, torch.Tensor]
    samples: int
    means: dict[str, float]
    moments: dict[str, Moments]


def scorable(model: nn.Module, include: Patterns, exclude: Patterns) -> dict[str, nn.Parameter]:
    """The prunable parameters, all of which have to be floating-point.

    Raises:
        ParameterSelectionError: See `prunable_parameters`.
        ScoreError: Integer weights.
    """
    parameters = prunable_parameters(model, include, exclude)
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise ScoreError(
                f"{name} is {parameter.dtype}, which has no gradient; exclude it or load the model unquantised."
            )
    return parameters


def compute_scores(
    model: nn.Module, dataloader: Any, criterion: Criterion, options: Options, *, moments: bool = False
) -> Scored:
    """Scores of the prunable parameters by one criterion.

    Raises:
        ScoreError: No samples, a loss or score that is not finite, an argument out of range.
        BatchError: A batch or output of an unknown form.
        ParameterSelectionError: Nothing to score.
        MemoryPlanError: More memory is needed than is free.
    """
    refuse_folder(model, "gradients need backward passes, and these the whole model in memory")
    model, ranks = joined(model, options.process_group, "Scores from gradients", sharded=True)
    with ranks.together():
        return _together(model, ranks, dataloader, criterion, options, moments=moments)


def _together(
    model: nn.Module, ranks: Ranks, dataloader: Any, criterion: Criterion, options: Options, *, moments: bool
) -> Scored:
    refuse_if_too_large(
        "fisher",
        model,
        dataloader,
        check=options.check_memory,
        include=options.include,
        exclude=options.exclude,
        store=options.store if isinstance(options.store, str) else "disk",
        gradient_checkpointing=options.checkpoint_activations,
    )
    parameters = scorable(model, options.include, options.exclude)
    criterion = _clipped(criterion, options)
    chunks = list(_chunks(parameters, options.chunk_size))
    if len(chunks) > 1 and options.store not in ("cpu", "device"):
        raise ScoreError("store='disk' needs no chunk_size: its accumulators are in no memory to be bounded.")
    scoring = _Scoring(model, parameters, criterion, options, ranks, with_moments=moments)
    bars = options.progress and ranks.first
    with borrowed(model, checkpoint_activations=options.checkpoint_activations):
        samples = Samples(
            *(dataloader, options.num_samples),
            seed=options.seed,
            passes=len(chunks),
            may_be_none=ranks.size > 1,
        )
        gradients = Gradients(
            model,
            scoring.places,
            grouping=criterion.grouping,
            loss_fn=options.loss_fn,
            clip=options.gradient_clip,
            autocast=options.use_mixed_precision and _on_cuda(parameters),
            together=scoring.together,
        )
        for names in chunks:
            if criterion.drawn:
                gradients.drawn = torch.Generator().manual_seed(options.seed + ranks.rank)
            sums = scoring.sums(names)
            bar = tqdm(samples, desc="scoring", unit=" batches", delay=2, disable=not bars)
            counts = gradients.go_through(bar, names, sums)
            count = counts["steps"] if criterion.grouping == "batch mean" else counts["samples"]
            scores = sums.finish(criterion.statistic, count, scoring.finish)
            if len(chunks) > 1:
                scores = {name: score.cpu() for name, score in scores.items()}
            scoring.gather(scores, sums.moments, counts["samples"])
    return scoring.result()


class _Scoring:
    """Where scores are made: of whole weights, or of this rank's parts of them."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        criterion: Criterion,
        options: Options,
        ranks: Ranks,
        *,
        with_moments: bool,
    ) -> None:
        self._parameters, self._criterion, self._ranks = parameters, criterion, ranks
        self._path = options.store if isinstance(options.store, os.PathLike) else None
        self._division = Division.of(parameters)
        self._here = {name: local_of(parameter) for name, parameter in parameters.items()}
        self.places = places_of(model, parameters)
        self.together = Together(ranks) if self._division is None else InStep(ranks, model)
        self.finish = partial(criterion.finish, self._here.__getitem__)
        self._with_moments = with_moments
        self._shards: dict[str, list[Shard]] = {}
        if self._division is not None:
            refuse_other_parts(model)
            everywhere = ranks.gather(dict(self._division.shards))
            self._shards = {name: [shards[name] for shards in everywhere] for name in parameters}
        # One file is one rank's, and of scores in parts it is written at the end.
        alone = self._division is None and ranks.first
        self._store: Store = "disk" if self._path is not None and not alone else options.store
        self._gathered = Scored({}, 0, {}, {})

    def sums(self, names: Sequence[str]) -> Sums:
        """Sums over gradients of these parameters."""
        like = {name: self._here[name] for name in names}
        by_sample = self._with_moments and self._criterion.grouping == "sample"
        summary = partial(self._criterion.summary, self._weight_in_pass) if by_sample else None
        if self._division is None:
            return Sums(like, [self._criterion.statistic], self._store, summary, self._ranks)
        statistic = self._criterion.statistic
        return SumsInParts(like, statistic, self._store, summary, self._ranks, self._shards)

    def gather(self, scores: Mapping[str, torch.Tensor], moments: Mapping[str, Moments], samples: int) -> None:
        """Take scores of some parameters."""
        found = self._gathered
        found.scores.update(scores)
        found.moments.update(_added(self._ranks.gather(moments)))
        if self._with_moments:
            found.means.update(self._means(scores))
        self._gathered = found._replace(samples=samples)

    def result(self) -> Scored:
        """All that was taken, and the file of it."""
        found = self._gathered
        if self._division is None:
            return found
        if self._path is not None:
            write_whole(self._path, found.scores, self._division)
        spread = {name: spread_as(self._parameters[name], score) for name, score in found.scores.items()}
        return found._replace(scores=spread)

    def _means(self, scores: Mapping[str, torch.Tensor]) -> dict[str, float]:
        if self._division is None:
            return {name: float(score.mean(dtype=torch.float64)) for name, score in scores.items()}
        sums = np.array([float(score.sum(dtype=torch.float64)) for score in scores.values()])
        numels = [self._division.shapes[name].numel() for name in scores]
        return dict(zip(scores, (self._ranks.sum(sums) / numels).tolist(), strict=True))

    def _weight_in_pass(self, name: str) -> torch.Tensor:
        """The whole weight, which in a pass through a model in parts stands in its place."""
        module, key = self.places[name][0]
        weight = module._parameters[key]
        assert weight is not None
        if is_sharded(weight):
            raise ScoreError(
                f"{name} is called in places that the loss does not depend on, and the statistics of its "
                "gradients need the whole weight once it is in parts again. Leave return_stats out."
            )
        return weight


def _added(moments: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """Those of each rank as one."""
    return {name: sum((one[name] for one in moments), Moments()) for name in moments[0]}


def _clipped(criterion: Criterion, options: Options) -> Criterion:
    """The criterion with gradients by sample if they are to be clipped one by one."""
    if options.gradient_clip is None or criterion.grouping == "sample":
        return criterion
    if criterion.grouping == "batch mean":
        raise ScoreError("gradient_clip bounds the gradient of each sample; kind='batch' never looks at one.")
    return replace(criterion, grouping="sample")


def _chunks(parameters: Mapping[str, torch.Tensor], size: int | None) -> Iterator[Sequence[str]]:
    """Names, in order, of at most `size` weights together, or of one parameter."""
    chunk: list[str] = []
    weights = 0
    for name, parameter in parameters.items():
        if chunk and size is not None and weights + parameter.numel() > size:
            yield chunk
            chunk, weights = [], 0
        chunk.append(name)
        weights += parameter.numel()
    yield chunk


def _on_cuda(parameters: Mapping[str, torch.Tensor]) -> bool:
    return any(parameter.is_cuda for parameter in parameters.values())
