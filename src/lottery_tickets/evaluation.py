"""How good a ticket is: its loss beside the dense model's on the same batches, and how sure that is."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn
from torch.distributed import ProcessGroup
from tqdm import tqdm

from lottery_tickets._batches import (
    BatchLoss,
    LossFunction,
    Precision,
    batches_of,
    check_precision,
    evaluating,
    in_step,
    measure,
    total,
    with_samples,
)
from lottery_tickets._quality import Baseline, TicketQuality, checked_baseline, ticket_quality
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import EvaluationError
from lottery_tickets.large_models import HiddenStates, MappedModel, map_model, resolve_model
from lottery_tickets.masks import Mask, ShardedMask, applied, as_mask, parameters_of
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.training import check_masks_alike, joined, lies_in_parts

__all__ = [
    "Baseline",
    "TicketQuality",
    "compute_lottery_ticket_qualities",
    "compute_lottery_ticket_quality",
]

_log = logging.getLogger(__name__)

Nonfinite = Literal["raise", "skip"]


def compute_lottery_ticket_quality(
    model: nn.Module | str | os.PathLike[str],
    mask: Mapping[str, torch.Tensor],
    dataloader: Any,
    baseline_performance: float | Mapping[str, Any] | None = None,
    max_batches: int | None = None,
    precision_mode: Precision = "high",
    *,
    loss_fn: LossFunction | None = None,
    confidence: float = 0.95,
    nonfinite: Nonfinite = "raise",
    dtype: torch.dtype | None = None,
    hidden_states: HiddenStates = "memory",
    progress: bool = True,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> TicketQuality:
    """Loss, perplexity or accuracy of a ticket beside the dense model's on the same batches.

    Means weigh tokens (or labels, or samples), not batches. Intervals are over batches taken as independent draws,
    by the ratio estimator with Student's t; that of the retention is paired, since ticket and dense model see the
    same batches. Each batch is asked for once, so a generator will do. The model comes back as it was: weights,
    modes, flags and torch's random state.

    Of a checkpoint's folder, the model need not fit in memory: all batches go through one block of the dense
    model and of the tickets before the next block is read, so that each weight is read once (see `map_model`).
    Batches, and hidden states of all of them, are kept until the end. It computes on the CPU.

    Args:
        model: Any module, of any dtype, on any device, in either mode; evaluated in evaluation mode. Or a
            checkpoint folder or hub id, which is evaluated block by block.
        mask: A `Mask`, a plain dict of tensors, or for a model in parts a `ShardedMask`.
        dataloader: Iterable of batches, or one batch. A batch is a mapping (dict, `BatchEncoding`) with `labels`,
            which a causal language model may lack, or a pair `(inputs, targets)`. Labels of -100 and positions
            where `attention_mask` is 0 do not count. Integer targets mean cross entropy, floating-point ones
            squared error.
        baseline_performance: The dense model's result if it is known, so as not to measure it: a mapping with
            "loss" or "accuracy", such as `quality["baseline"]`, or a number, which is the dense accuracy where
            labels are classes and the dense loss otherwise. It is taken as exact: the interval of the retention is
            then the ticket's alone.
        max_batches: Stop after so many batches; of each rank, where there are several.
        precision_mode: "high", losses from float32 logits (made in chunks); "fast", in the model's dtype. Sums are
            float64 either way. A loss that the model itself computes is taken as it comes.
        loss_fn: `loss_fn(logits, targets)` in place of the loss above; `logits` is the model's output, or what
            stands under `logits` in it, and `targets` the batch's labels as they came. Returns the mean as a
            scalar (over the labels other than -100; over samples if they are not integers), or a loss per unit.
        confidence: Coverage of the intervals, in (0, 1).
        nonfinite: "raise" refuses a loss that is not finite, "skip" leaves such batches out on both sides.
        dtype: Of a folder: data type to compute in; None for the checkpoint's, as the loaded model would.
        hidden_states: Of a folder: where the hidden states of all batches wait for the next block, "memory" or
            "disk", a temporary file in $TMPDIR.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: Ranks with the same weights and masks, each of which measures batches of its own, any number
            of them (or none); every rank learns what one would that saw them all. None for this process alone, or
            the group of a model in DistributedDataParallel. A model in parts (`fully_shard`) is that of all ranks
            of the job, of which each then needs a batch at least. Not for a folder.

    Returns:
        A `TicketQuality`.

    Raises:
        EvaluationError: No batches, no labels, a loss that is not finite, or an argument out of range.
        BatchError: A batch or a model output of an unknown form; the message says what came.
        MaskMismatchError: A mask that does not fit the model.
        MemoryPlanError: More memory is needed than is free.
        CheckpointError: A folder that `map_model` refuses.
        DistributedError: A rank failed or has gone, or has other masks than others.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_lottery_ticket_quality
        >>> model = torch.nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[2.0, -0.1], [0.1, 2.0]]))
        >>> mask = {"weight": torch.tensor([[True, False], [False, True]])}
        >>> batches = [(torch.eye(2), torch.tensor([0, 1])), (torch.eye(2)[:1], torch.tensor([0]))]
        >>> quality = compute_lottery_ticket_quality(model, mask, batches)
        >>> quality["accuracy"], quality["performance_retention"], quality["sparsity"], quality["num_samples"]
        (1.0, 1.0, 0.5, 3)

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 1: a winning ticket matches the
        test accuracy of the dense network. Cochran, "Sampling Techniques", 3rd edition, 1977, section 6.4.
    """
    options = _Options(
        max_batches, precision_mode, loss_fn, confidence, nonfinite, progress, check_memory, dtype, hidden_states
    )
    model, ranks = joined(model, process_group, "Quality", sharded=True)
    with ranks.together():
        return _qualities(model, {"mask": mask}, dataloader, baseline_performance, options, ranks)["mask"]


def compute_lottery_ticket_qualities(
    model: nn.Module | str | os.PathLike[str],
    masks: Mapping[str, Mapping[str, torch.Tensor]],
    dataloader: Any,
    baseline_performance: float | Mapping[str, Any] | None = None,
    max_batches: int | None = None,
    precision_mode: Precision = "high",
    *,
    loss_fn: LossFunction | None = None,
    confidence: float = 0.95,
    nonfinite: Nonfinite = "raise",
    dtype: torch.dtype | None = None,
    hidden_states: HiddenStates = "memory",
    progress: bool = True,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> dict[str, TicketQuality]:
    """Quality of several tickets of one model; the dense model is measured once, on the same batches.

    Each entry is what `compute_lottery_ticket_quality` returns for that mask alone.

    Args:
        model: See `compute_lottery_ticket_quality`.
        masks: Any name to a mask.
        dataloader: See there; each batch is asked for once, whatever the number of tickets.
        baseline_performance: See there.
        max_batches: See there.
        precision_mode: See there.
        loss_fn: See there.
        confidence: See there.
        nonfinite: See there; with "skip" a batch is left out for the tickets whose loss it spoils, and their
            baselines.
        dtype: See there.
        hidden_states: See there.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: See there.

    Returns:
        A `TicketQuality` for each name of `masks`.

    Raises:
        EvaluationError: No masks, no batches, no labels, a loss that is not finite, or an argument out of range.
        BatchError: A batch or a model output of an unknown form.
        MaskMismatchError: A mask that does not fit the model.
        MemoryPlanError: More memory is needed than is free.
        CheckpointError: A folder that `map_model` refuses.
        DistributedError: A rank failed or has gone, or has other masks than others.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_lottery_ticket_qualities, create_magnitude_mask
        >>> model = torch.nn.Linear(8, 3)
        >>> batches = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(4)]
        >>> masks = dict(zip(["half", "most"], create_magnitude_mask(model, [0.5, 0.875])))
        >>> qualities = compute_lottery_ticket_qualities(model, masks, batches)
        >>> {name: quality["sparsity"] for name, quality in qualities.items()}
        {'half': 0.5, 'most': 0.875}
    """
    if not masks:
        raise EvaluationError("masks is empty; give at least one mask by name.")
    options = _Options(
        max_batches, precision_mode, loss_fn, confidence, nonfinite, progress, check_memory, dtype, hidden_states
    )
    model, ranks = joined(model, process_group, "Quality", sharded=True)
    with ranks.together():
        return _qualities(model, masks, dataloader, baseline_performance, options, ranks)


@dataclass(frozen=True)
class _Options:
    max_batches: int | None
    precision: Precision
    loss_fn: LossFunction | None
    confidence: float
    nonfinite: Nonfinite
    progress: bool
    check_memory: bool
    dtype: torch.dtype | None
    hidden_states: HiddenStates

    def __post_init__(self) -> None:
        count = self.max_batches
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 1):
            raise EvaluationError(f"max_batches is a positive integer or None for all, got {count!r}.")
        if not 0 < self.confidence < 1:
            raise EvaluationError(f"confidence is a probability between 0 and 1, got {self.confidence!r}.")
        if self.nonfinite not in get_args(Nonfinite):
            raise EvaluationError(f"nonfinite is 'raise' or 'skip', got {self.nonfinite!r}.")
        if self.hidden_states not in get_args(HiddenStates):
            raise EvaluationError(f"hidden_states is 'memory' or 'disk', got {self.hidden_states!r}.")
        check_precision(self.precision)


@dataclass(frozen=True)
class _Run:
    """One side of the comparison, batch by batch: a ticket, or the dense model, which has no mask."""

    whose: str
    mask: Mask | ShardedMask | None
    losses: list[BatchLoss] = field(default_factory=list)


class _Measure(Protocol):
    """Gives every run its losses, batch by batch."""

    def __call__(self, runs: Sequence[_Run], model: nn.Module, dataloader: Any, options: _Options) -> None: ...


def _qualities(
    model: nn.Module | str | os.PathLike[str],
    masks: Mapping[str, Mapping[str, torch.Tensor]],
    dataloader: Any,
    baseline_performance: float | Mapping[str, Any] | None,
    options: _Options,
    ranks: Ranks,
) -> dict[str, TicketQuality]:
    given = checked_baseline(baseline_performance)
    tickets = {name: _Run(f"ticket {name!r}", _taken(mask)) for name, mask in masks.items()}
    if isinstance(model, (str, os.PathLike)):
        with map_model(resolve_model(model), options.dtype) as found:
            waiting = _count(batches_of(dataloader), options.max_batches) or 1
            return _judged(
                *(found.module, tickets, dataloader, given, options, ranks, partial(_measure_by_block, found)),
                from_disk=True,
                batches=waiting if options.hidden_states == "memory" else 0,
            )
    if options.dtype is not None or options.hidden_states != "memory":
        raise EvaluationError(
            "dtype and hidden_states are for a checkpoint's folder, evaluated block by block; this is a "
            f"{type(model).__name__} in memory, which computes in its own type: model.to(dtype) changes it."
        )
    return _judged(model, tickets, dataloader, given, options, ranks, partial(_measure, ranks))


def _judged(
    model: nn.Module,
    tickets: Mapping[str, _Run],
    dataloader: Any,
    given: Mapping[str, float] | None,
    options: _Options,
    ranks: Ranks,
    measure_runs: _Measure,
    **planned: Any,
) -> dict[str, TicketQuality]:
    """Quality of each ticket, beside what is given or the dense model measured too."""
    for run in tickets.values():
        parameters_of(model, run.mask or {})
    check_masks_alike(ranks, [run.mask for run in tickets.values() if run.mask is not None])
    refuse_if_too_large(
        *("quality", model, dataloader),
        check=options.check_memory,
        masks=len(tickets),
        **planned,
    )
    dense = _Run("the dense model", None)
    runs = [*tickets.values()] if given else [dense, *tickets.values()]
    with evaluating(model), _random_state_kept(model):
        measure_runs(runs, model, dataloader, options)
    _gather(runs, ranks)
    if not runs[0].losses:
        raise EvaluationError(
            "The dataloader gave no batches; one that can be iterated only once may be spent already."
        )
    return {
        name: ticket_quality(
            run.losses,
            baseline=given or dense.losses,
            sparsity=run.mask.sparsity if run.mask else 0.0,
            confidence=options.confidence,
        )
        for name, run in tickets.items()
    }


def _taken(mask: Mapping[str, torch.Tensor]) -> Mask | ShardedMask:
    return mask if isinstance(mask, ShardedMask) else as_mask(mask)


def _measure(ranks: Ranks, runs: Sequence[_Run], model: nn.Module, dataloader: Any, options: _Options) -> None:
    """Every run on every batch, batch by batch, on this rank."""
    batches = batches_of(dataloader)
    count = _count(batches, options.max_batches)
    bars = options.progress and ranks.first
    with tqdm(total=count and count * len(runs), desc="evaluating", delay=2, disable=not bars) as bar:
        own = with_samples(islice(batches, options.max_batches), ranks)
        steps = in_step(own, ranks) if lies_in_parts(model) else ((batch, True) for batch in own)
        for number, (batch, counts) in enumerate(steps):
            for run in runs:
                with nullcontext() if run.mask is None else applied(model, run.mask):
                    part = _measure_batch(run, model, number, batch, options)
                if counts:
                    run.losses.append(part)
                    bar.update()


def _measure_by_block(
    on_disk: MappedModel,
    runs: Sequence[_Run],
    model: nn.Module,
    dataloader: Any,
    options: _Options,
) -> None:
    """Every run on every batch, block by block."""

    def measured(numbered: tuple[int, Any], which: int) -> BatchLoss:
        return _measure_batch(runs[which], model, *numbered, options)

    losses = on_disk.run(
        measured,
        enumerate(islice(batches_of(dataloader), options.max_batches)),
        [None if run.mask is None else as_mask(run.mask) for run in runs],
        hidden_states=options.hidden_states,
        progress="evaluating" if options.progress else None,
    )
    for run, found in zip(runs, losses, strict=True):
        run.losses.extend(found)


def _gather(runs: Sequence[_Run], ranks: Ranks) -> None:
    """What all ranks measured, in their order."""
    parts = ranks.gather([run.losses for run in runs])
    for run, *theirs in zip(runs, *parts, strict=True):
        run.losses[:] = [part for losses in theirs for part in losses]


def _measure_batch(run: _Run, model: nn.Module, number: int, batch: Any, options: _Options) -> BatchLoss:
    part = measure(model, batch, precision=options.precision, loss_fn=options.loss_fn)
    part = total([part])  # without what measured it
    _log.debug("batch %d, %s: loss %g over %d units", number, run.whose, part.mean, part.units)
    if options.nonfinite == "raise" and not math.isfinite(part.loss_sum):
        raise EvaluationError(
            f"Batch {number}: the loss of {run.whose} is {part.mean}. nonfinite='skip' leaves such batches out."
        )
    return part


def _count(batches: Iterable[Any], most: int | None) -> int | None:
    """How many batches will come, where that is known."""
    try:
        length: int | None = len(batches)  # type: ignore[arg-type]
    except TypeError:
        length = None
    return min((limit for limit in (length, most) if limit is not None), default=None)


@contextmanager
def _random_state_kept(model: nn.Module) -> Iterator[None]:
    """Leave torch's generators as they are: starting a DataLoader draws from one."""
    devices = {parameter.device.index for parameter in model.parameters() if parameter.is_cuda}
    with torch.random.fork_rng(devices=sorted(devices)):
        yield
