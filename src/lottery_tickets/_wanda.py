"""Wanda's scores: of a model in memory, and of one that stays on disk, block by block."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.utils.data import DataLoader
from tqdm import tqdm

from lottery_tickets._batches import batches_of, size_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients import (
    InputNorms,
    InStep,
    Samples,
    Store,
    Tensors,
    Together,
    borrowed,
    refuse_other_parts,
    scorable,
    write_whole,
)
from lottery_tickets.large_models import HiddenStates, MappedModel, map_model, resolve_model
from lottery_tickets.masks import Division, Patterns, Shard, local_of, reshard, spread_as
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.training import joined, lies_in_parts


def compute_wanda_importance(
    model: nn.Module | str | os.PathLike[str],
    dataloader: Any,
    num_samples: int | None = 128,
    *,
    include: Patterns = None,
    exclude: Patterns = None,
    store: Store = "cpu",
    dtype: torch.dtype | None = None,
    hidden_states: HiddenStates = "memory",
    seed: int = 0,
    progress: bool = True,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> dict[str, torch.Tensor]:
    """Weight times activation: `|w_ij| * ||x_j||`, x_j the layer's input feature j over all tokens of all samples.

    For a convolution, x is all that a weight is multiplied with: its input channel at its place in the kernel. A
    layer used several times, or a weight in several layers, takes the norm over all uses. Meant to be compared
    within an output row: `create_importance_mask(scores, sparsity, scope="row")`. Forward passes only.

    Of a checkpoint's folder, the model need not fit in memory: all batches go through one block before the next is
    read, so that each weight is read once (see `map_model`); with `store` neither need the scores.

    Args:
        model: Any module, of any floating-point type; or a checkpoint folder or hub id, scored block by block on
            the CPU.
        dataloader: Iterable of batches, or one batch; labels are not needed. Positions where `attention_mask` is 0
            count for nothing, in layers whose input has one row for each position.
        num_samples: Stop after so many samples; None for all.
        include: Widens what is scored; only weights of layers have an input feature.
        exclude: Narrows it.
        store: Where scores lie: "cpu"; "device", beside the weights; "disk", a mapped temporary file (in $TMPDIR)
            that is gone when they are; or a `Path`, a mapped safetensors file that stays.
        dtype: Of a folder: data type to compute in; None for the checkpoint's, as the loaded model would.
        hidden_states: Of a folder: where the hidden states of all batches wait for the next block, "memory" or
            "disk", a temporary file in $TMPDIR.
        seed: Of the order of a dataloader that shuffles.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: Ranks that go through batches of their own; see `compute_gradient_importance`. Not for a
            folder.

    Returns:
        Scores by name.

    Raises:
        ScoreError: No samples, activations that are not finite, or weights whose layer was not called.
        BatchError: A batch of an unknown form.
        ParameterSelectionError: Nothing to score.
        CheckpointError: A folder that `map_model` refuses.
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
    options = _Options(num_samples, include, exclude, store, hidden_states, seed, progress, check_memory)
    model, ranks = joined(model, process_group, "Wanda", sharded=True)
    if isinstance(model, (str, os.PathLike)):
        with map_model(resolve_model(model), dtype) as found:
            return _by_block(found, dataloader, options)
    if dtype is not None or hidden_states != "memory":
        raise ScoreError(
            "dtype and hidden_states are for a checkpoint's folder, scored block by block; this is a "
            f"{type(model).__name__} in memory, which computes in its own type."
        )
    with ranks.together():
        return _in_memory(model, dataloader, options, ranks)


class _Options(NamedTuple):
    num_samples: int | None
    include: Patterns
    exclude: Patterns
    store: Store
    hidden_states: HiddenStates
    seed: int
    progress: bool
    check_memory: bool


class _Scoring:
    """What both ways have: the norms, and where scores lie."""

    def __init__(
        self, model: nn.Module, dataloader: Any, options: _Options, *, may_be_none: bool = False, **planned: Any
    ) -> None:
        refuse_if_too_large(
            *("wanda", model, dataloader),
            check=options.check_memory,
            include=options.include,
            exclude=options.exclude,
            store=options.store if isinstance(options.store, str) else "disk",
            **planned,
        )
        self.parameters = scorable(model, options.include, options.exclude)
        self.norms = InputNorms(model, self.parameters)
        self.scores = Tensors({name: local_of(one) for name, one in self.parameters.items()}, options.store)
        # One pass: a dataloader that can be gone through once will do.
        self.samples = Samples(
            dataloader, options.num_samples, seed=options.seed, passes=1, may_be_none=may_be_none
        )

    def finish(self, name: str, weight: torch.Tensor, shard: Shard | None = None) -> None:
        """The scores of one parameter, or of this part of it."""
        with self.scores.use(name) as scores:
            self.norms.score(name, weight, scores, shard)


def _in_memory(model: nn.Module, dataloader: Any, options: _Options, ranks: Ranks) -> dict[str, torch.Tensor]:
    in_parts = lies_in_parts(model)
    # One file is one rank's, and of scores in parts it is written at the end.
    path = options.store if isinstance(options.store, os.PathLike) else None
    held = options._replace(store="disk") if path is not None and (in_parts or not ranks.first) else options
    scoring = _Scoring(model, dataloader, held, may_be_none=ranks.size > 1)
    division = Division.of(scoring.parameters)
    if division is not None:
        refuse_other_parts(model)
    together = InStep(ranks, model) if in_parts else Together(ranks)
    bar = tqdm(
        scoring.samples, desc="scoring", unit=" batches", delay=2, disable=not (options.progress and ranks.first)
    )
    with borrowed(model, checkpoint_activations=False), torch.no_grad(), scoring.norms.watching():
        for batch, is_own in together.batches(bar):
            with together.passing():
                scoring.norms.add(batch, is_own=is_own)
    reshard(model)
    scoring.norms.add_up(ranks, next(iter(scoring.parameters.values())).device)
    scoring.norms.refuse_missing()
    for name, parameter in scoring.parameters.items():
        scoring.finish(name, local_of(parameter), None if division is None else division.shards[name])
    scores = scoring.scores.all()
    if division is not None and path is not None:
        write_whole(path, scores, division)
    return {name: spread_as(parameter, scores[name]) for name, parameter in scoring.parameters.items()}


def _by_block(found: MappedModel, dataloader: Any, options: _Options) -> dict[str, torch.Tensor]:
    waiting = _count(dataloader, options.num_samples) if options.hidden_states == "memory" else 0
    scoring = _Scoring(found.module, dataloader, options, from_disk=True, batches=waiting)

    def released(names: Iterable[str]) -> None:
        for name in names:
            if name in scoring.norms:
                scoring.finish(name, found.weights.dense(name))

    with borrowed(found.module, checkpoint_activations=False), scoring.norms.watching():
        found.run(
            lambda batch, _: scoring.norms.add(batch),
            scoring.samples,
            hidden_states=options.hidden_states,
            released=released,
            progress="scoring" if options.progress else None,
        )
    scoring.norms.refuse_missing()
    return scoring.scores.all()


def _count(dataloader: Any, samples: int | None) -> int:
    """How many batches will be drawn, where that is known without drawing one; else 1."""
    batches = batches_of(dataloader)
    if isinstance(batches, DataLoader) and batches.batch_size is not None and samples is not None:
        return math.ceil(samples / batches.batch_size)
    if not isinstance(batches, (list, tuple)):
        return 1
    before = accumulate((size_of(batch) for batch in batches), initial=0)
    return max(1, sum(samples is None or count < samples for count, _ in zip(before, batches, strict=False)))
