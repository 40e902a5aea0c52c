"""Early-bird tickets: train until the mask has settled, and tell when that was.

A magnitude mask drawn again and again during training changes less and less. Once the distance between masks (the
fraction of their bits that differ) stays small, the ticket that training would end with is already there, long
before the weights are (You et al. 2020). `compute_early_bird_tickets` trains a model with as little memory as
training can take, draws its mask at every check, and stops when the criterion says that it has settled:

- "window": the paper's text. The last 5 distances between consecutive masks are all below 0.1.
- "queue": the authors' code. The newest mask is within 0.1 of each of the 4 before it.
- "rank_correlation": Spearman's correlation of the magnitudes with those at the check before is at least 0.95 at 3
  checks in a row.

Between sparsities 0.3 and 0.7, that is; beyond them random masks differ in fewer bits, and 0.1 shrinks with that
(see `EarlyBirdDetector`).

The first mask is drawn before training, at epoch 0, as the authors' published loop draws it; then one after every
`check_interval` epochs or `check_every_steps` steps. A mask also stands still where the weights do: each check
measures the share of weights that moved and what distance the same movement would have given at random, and a mask
that is stable because nothing moves is no early bird.

    results = compute_early_bird_tickets(model, dataloader, max_epochs=30, target_sparsity=0.5)
    if results["converged"]:
        results["final_mask"].save("ticket.safetensors")

How training is done:

- The data: any iterable of batches that can be gone through once an epoch; batches are mappings, or pairs (inputs,
  targets). The loss is the one that transformers or torch would take, or `loss_fn(logits, targets)`.
- The optimizer: with `use_sgd=True` the step is taken inside the backward pass, tensor by tensor, and no gradient
  outlives it. `use_sgd=False` is AdamW; `optimizer` names another, or makes any of torch's.
- Two bytes a weight: steps that are too small for bf16 would be rounded away, so they are rounded at random, on
  average correctly (`precision="stochastic"`), or their remainders are kept (`"compensated"`).
- Batches that do not fit: `max_batch_size` splits them, and memory that runs out in the forward pass halves the
  pieces; the update is that of the whole batch.
- `run_dir`: after every check the whole state is on disk. A run that was killed goes on from there when it is
  called in the same way again, sees the same batches, and ends with the same ticket.

Whole channels, as in the paper, are watched with `structure="channel"`; see docs/structured.md.

For training loops of one's own there is the detector alone: `EarlyBirdDetector`, `detect_early_bird_convergence`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, overload

from torch import nn
from torch.distributed import ProcessGroup

from lottery_tickets._batches import LossFunction
from lottery_tickets._early_bird._results import EarlyBirdCheckpoint, EarlyBirdResults, EarlyBirdTraining
from lottery_tickets._early_bird._settings import checked_settings
from lottery_tickets._early_bird._whole import find_birds
from lottery_tickets.detection import Criterion, EarlyBirdDetector, detect_early_bird_convergence
from lottery_tickets.masks import Kind, Patterns
from lottery_tickets.training import (
    Checkpointing,
    Nonfinite,
    OptimizerFunction,
    Precision,
    Recipe,
    SchedulerFactory,
    TrainerFunction,
    joined,
    let_go,
)

__all__ = [
    "EarlyBirdCheckpoint",
    "EarlyBirdDetector",
    "EarlyBirdResults",
    "EarlyBirdTraining",
    "compute_early_bird_tickets",
    "detect_early_bird_convergence",
]


@overload
def compute_early_bird_tickets(
    model: nn.Module,
    dataloader: Any,
    trainer_fn: TrainerFunction | None = ...,
    max_epochs: int = ...,
    check_interval: int = ...,
    target_sparsity: float = ...,
    convergence_threshold: float | None = ...,
    stability_window: int | None = ...,
    use_magnitude_ranking: bool = ...,
    max_batch_size: int | None = ...,
    learning_rate: float | None = ...,
    use_sgd: bool = ...,
    *,
    criterion: Criterion = ...,
    check_every_steps: int | None = ...,
    optimizer: str | OptimizerFunction | None = ...,
    scheduler: SchedulerFactory | None = ...,
    loss_fn: LossFunction | None = ...,
    gradient_checkpointing: Checkpointing = ...,
    max_grad_norm: float | None = ...,
    momentum: float = ...,
    weight_decay: float = ...,
    precision: Precision = ...,
    nonfinite: Nonfinite = ...,
    max_skipped: float = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    run_dir: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    seed: int = ...,
    structure: Kind | None = ...,
    bn_l1: float = ...,
    progress: bool = ...,
    save_masks: bool = ...,
    check_memory: bool = ...,
    process_group: ProcessGroup | None = ...,
) -> EarlyBirdResults: ...


@overload
def compute_early_bird_tickets(
    model: nn.Module,
    dataloader: Any,
    trainer_fn: TrainerFunction | None = ...,
    max_epochs: int = ...,
    check_interval: int = ...,
    target_sparsity: Sequence[float] = ...,
    convergence_threshold: float | None = ...,
    stability_window: int | None = ...,
    use_magnitude_ranking: bool = ...,
    max_batch_size: int | None = ...,
    learning_rate: float | None = ...,
    use_sgd: bool = ...,
    *,
    criterion: Criterion = ...,
    check_every_steps: int | None = ...,
    optimizer: str | OptimizerFunction | None = ...,
    scheduler: SchedulerFactory | None = ...,
    loss_fn: LossFunction | None = ...,
    gradient_checkpointing: Checkpointing = ...,
    max_grad_norm: float | None = ...,
    momentum: float = ...,
    weight_decay: float = ...,
    precision: Precision = ...,
    nonfinite: Nonfinite = ...,
    max_skipped: float = ...,
    include: Patterns = ...,
    exclude: Patterns = ...,
    run_dir: str | os.PathLike[str] | None = ...,
    resume: bool = ...,
    seed: int = ...,
    structure: Kind | None = ...,
    bn_l1: float = ...,
    progress: bool = ...,
    save_masks: bool = ...,
    check_memory: bool = ...,
    process_group: ProcessGroup | None = ...,
) -> list[EarlyBirdResults]: ...


def compute_early_bird_tickets(
    model: nn.Module,
    dataloader: Any,
    trainer_fn: TrainerFunction | None = None,
    max_epochs: int = 30,
    check_interval: int = 1,
    target_sparsity: float | Sequence[float] = 0.5,
    convergence_threshold: float | None = None,
    stability_window: int | None = None,
    use_magnitude_ranking: bool = False,
    max_batch_size: int | None = None,
    learning_rate: float | None = None,
    use_sgd: bool = True,
    *,
    criterion: Criterion = "window",
    check_every_steps: int | None = None,
    optimizer: str | OptimizerFunction | None = None,
    scheduler: SchedulerFactory | None = None,
    loss_fn: LossFunction | None = None,
    gradient_checkpointing: Checkpointing = "auto",
    max_grad_norm: float | None = 1.0,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    precision: Precision = "stochastic",
    nonfinite: Nonfinite = "stop",
    max_skipped: float = 0.01,
    include: Patterns = None,
    exclude: Patterns = None,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    seed: int = 0,
    structure: Kind | None = None,
    bn_l1: float = 0.0,
    progress: bool = True,
    save_masks: bool = False,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> EarlyBirdResults | list[EarlyBirdResults]:
    r"""Train a model until its magnitude mask has settled; the mask is the early-bird ticket.

    With $m_t$ the mask of sparsity s at check t, over N prunable weights, two masks are

    $$d(m_i, m_j) = \frac{|m_i \oplus m_j|}{N}$$

    apart. `criterion` says which distances have to be small for how long; see `EarlyBirdDetector`. Checks are at
    epoch 0, before training, and after every `check_interval` epochs or `check_every_steps` steps. Training stops
    at the check at which the masks of all sparsities have settled, else after `max_epochs`. Masks that stand still
    because the weights do are not taken for settled ones.

    The model comes back trained, in its own modes and flags and without gradients; the caller's random states are
    left alone. The order of the data and everything else that is random hangs on `seed`: before each epoch
    Python's, numpy's and torch's states are seeded, and with them the loader's own generator. The same call gives
    the same bits where torch's operations do; see `ensure_deterministic_pruning` for accelerators.

    Args:
        model: Any module, on one device; parameters that require no gradient are not trained.
        dataloader: Batches, gone through once an epoch: mappings with what the model takes (and "labels"), or
            pairs (inputs, targets). Also a list of batches, or a single batch.
        trainer_fn: `trainer_fn(model, dataloader, epochs)` trains instead, between checks; a number that it
            returns is recorded for the loss. What it keeps from call to call is its own affair, also when a run
            goes on.
        max_epochs: Epochs to train at most; all are trained unless the masks settle.
        check_interval: Epochs between checks.
        target_sparsity: Fraction of the prunable weights to remove, in (0, 1). With several of them, one counting
            pass serves all masks, and one training all results.
        convergence_threshold: Of the criterion: the largest distance or the least correlation; None for its own.
        stability_window: Of the criterion: how many must agree; None for its own.
        use_magnitude_ranking: The same as `criterion="rank_correlation"`.
        max_batch_size: Samples in a forward pass at most. Larger batches are split into micro-batches, and the
            update is that of the whole batch, at the cost of holding its gradients (4 bytes a weight).
        learning_rate: None for 0.01 with SGD and 1e-4 with AdamW; of a function, for its own.
        use_sgd: SGD, whose step is taken inside the backward pass; False for AdamW.
        criterion: "window", "queue" or "rank_correlation".
        check_every_steps: Optimizer steps between checks, in place of epochs.
        optimizer: "sgd", "adamw", "adamw8bit" (states of one byte a number, by torchao), or a function from
            parameters to an optimizer of torch's, called with `lr` too if `learning_rate` is given. Overrides
            `use_sgd`.
        scheduler: A function from the torch optimizer to a learning rate scheduler, stepped once a step.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss: a scalar, the mean over targets
            that are not -100 (over samples if they are not integers), or a loss for each unit.
        gradient_checkpointing: Compute activations again in the backward pass instead of keeping them: "auto"
            where the model offers it, True, or False.
        max_grad_norm: Gradients are scaled down to this norm, each tensor by itself; None for no clipping. Of a
            function's optimizer, by the norm of all together.
        momentum: Of SGD; takes the weights' bytes again.
        weight_decay: Of SGD and AdamW by name.
        precision: How bf16 and fp16 weights take up small steps: "stochastic" rounding, "compensated" (the
            remainders are kept, which takes the weights' bytes again), or "nearest", which loses them.
        nonfinite: At a loss or gradient that is not finite, "stop" with the last mask, or "skip" the batch.
        max_skipped: Share of the batches that may be skipped, one being allowed in any case; more of them stop.
        include: Widens what is prunable; see `prunable_parameters`.
        exclude: Narrows it.
        run_dir: A folder for the run: after every check weights, optimizer, detector, random states and the place
            in the data are written there. Called in the same way again after a kill, it goes on from the last
            check.
        resume: If False, a folder that holds a run already is an error.
        seed: Non-negative integer.
        structure: "channel", "head" or "neuron" watches whole units instead of weights: masks, distances and the
            sparsity are of units, ranked by the scales of their batch normalisation where each has one, else by
            magnitude. `final_mask` removes the weights of the units that go, one of each layer always staying.
        bn_l1: Strength of an L1 penalty on the scales of batch normalisation while searching; the paper's is 1e-4.
        progress: Show a bar on anything that takes over two seconds.
        save_masks: Keep the mask of every check in `run_dir`/masks, as a ticket file.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: Ranks that train together, with the same weights and arguments on each: the update is that
            of the batches of all ranks as one, and every rank comes to the same results. Each is given batches of
            its own, as many as the others; `SharedBatches` gives it a share of every one. Rank 0 writes `run_dir`,
            which all see. None for this process alone, or the group of a model in DistributedDataParallel. A model
            in parts (`fully_shard`) is one of all ranks; see docs/distributed.md.

    Returns:
        An `EarlyBirdResults`, or a list of them in the order of the sparsities.

    Raises:
        TrainingError: An argument out of range, one that does not go with a model in parts, or two that contradict
            each other; no batches, or none that could be trained on.
        TrainingMemoryError: Memory that does not suffice for a single sample, or that ran out when some weights
            had been updated.
        DetectionError: A criterion, threshold or window that cannot be.
        SparsityError: A sparsity outside (0, 1).
        ParameterSelectionError: A pattern that matches nothing, or nothing to prune.
        WeightsError: Weights that are NaN before training, or on the meta device.
        BatchError: A batch of an unknown form.
        StructureError: A kind of unit that is not known, or that the model has none of.
        RunFolderError: A folder in use, of another configuration, damaged or not writable.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: A rank failed or has gone, or ranks have other weights, arguments or masks than others.

    Example:
        >>> import torch
        >>> from lottery_tickets.early_bird import compute_early_bird_tickets
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> inputs = torch.randn(64, 8)
        >>> data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
        >>> loader = torch.utils.data.DataLoader(data, batch_size=16, shuffle=True)
        >>> results = compute_early_bird_tickets(model, loader, learning_rate=0.1)
        >>> results["converged"], results["convergence_epoch"]
        (True, 5)
        >>> results["final_mask"].sparsity
        0.5

    References:
        You et al., "Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks", ICLR 2020,
        arXiv 1909.11957, section 3.2 (mask distance) and algorithm 1. Lv et al., "Full Parameter Fine-tuning for
        Large Language Models with Limited Resources", ACL 2024, arXiv 2306.09782, section 3.1 (the fused step).
    """
    model, ranks = joined(model, process_group, "The search for early-bird tickets", sharded=True)
    with ranks.together():
        settings = checked_settings(
            target_sparsity,
            criterion,
            use_magnitude_ranking=use_magnitude_ranking,
            convergence_threshold=convergence_threshold,
            stability_window=stability_window,
            max_epochs=max_epochs,
            check_interval=check_interval,
            check_every_steps=check_every_steps,
            include=include,
            exclude=exclude,
            seed=seed,
            structure=structure,
        )
        recipe = Recipe(
            trainer_fn=trainer_fn,
            max_batch_size=max_batch_size,
            learning_rate=learning_rate,
            optimizer=optimizer or ("sgd" if use_sgd else "adamw"),
            scheduler=scheduler,
            loss_fn=loss_fn,
            gradient_checkpointing=gradient_checkpointing,
            max_grad_norm=max_grad_norm,
            momentum=momentum,
            weight_decay=weight_decay,
            precision=precision,
            nonfinite=nonfinite,
            max_skipped=max_skipped,
            bn_l1=bn_l1,
        )
        results = find_birds(
            model,
            dataloader,
            settings,
            recipe,
            run_dir=run_dir,
            resume=resume,
            save_masks=save_masks,
            progress=progress,
            check_memory=check_memory,
            ranks=ranks,
        )
    let_go(ranks)
    return results if isinstance(target_sparsity, Sequence) else results[0]
