"""Iterative magnitude pruning: train, prune, rewind, and again, until the ticket is as sparse as it is to be.

This is how lottery tickets were found (Frankle and Carbin 2019). A dense network is trained; the smallest of its
trained weights are pruned; those that are left are put back to what they were early in training, and the smaller
network is trained again, its pruned weights held at zero. After n such rounds the mask has the target's sparsity,
and the masks before it are those of all the densities between, each inside the one before.

    results = compute_iterative_magnitude_pruning(
        model, train, target_sparsity=0.9, num_iterations=10, epochs=20, eval_dataloader=validation, run_dir="run")
    for one in (results["dense"], *results["iterations"]):
        print(one["sparsity"], one["accuracy"], one["early_stopping_step"])

What is put back, `rewind`:

- "weights": weights, buffers (such as BatchNorm's statistics), optimizer and schedule as they were at the
  rewinding point, `rewind_epoch` or `rewind_step`. 0 is the initialisation, as in the first paper; larger networks
  need a point shortly after it (Frankle et al. 2020; `lottery_tickets.stability` finds it).
- "learning_rate": the schedule alone; weights stay as trained, and the optimizer's averages begin anew (Renda et
  al. 2020).
- "none": nothing. The network is trained on at the last learning rate: fine-tuning.

Each network is trained from the rewinding point to `epochs`, by the same batches in the same order. What a
training loop of one's own does goes into `trainer_fn`; masks are held whatever it does.

`run_dir` holds a run that can be killed at any moment:

    config.json, metrics.jsonl     what was asked for; a line for each evaluation and each round
    state-00000042/                the newest whole state
    rewind/model.safetensors       weights and buffers of the rewinding point: what the tickets are meant for
    masks/round-01.safetensors     the ticket of each round

Called in the same way again, it goes on from there, sees the same batches, and ends with the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from lottery_tickets._arguments import check_count
from lottery_tickets._batches import LossFunction
from lottery_tickets._iterative._drawing import ScoreFunction
from lottery_tickets._iterative._experiment import Experiment
from lottery_tickets._iterative._results import IterativePruningResults, PruningRound, Rewind
from lottery_tickets._iterative._schedule import groups_of
from lottery_tickets._iterative._settings import Scope, Settings
from lottery_tickets._iterative._trainings import Trainings
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import Patterns, lasting, prunable_parameters
from lottery_tickets.planning import refuse_training_if_too_large
from lottery_tickets.runs import RunFolder, private_random_state
from lottery_tickets.training import (
    Checkpointing,
    DataOrder,
    Judge,
    Nonfinite,
    OptimizerFunction,
    Precision,
    Recipe,
    SchedulerFactory,
    TrainerFunction,
    check_alike,
    checkpointed,
    configuration,
    joined,
    let_go,
    lies_in_parts,
    training,
)

__all__ = ["IterativePruningResults", "PruningRound", "compute_iterative_magnitude_pruning"]


def compute_iterative_magnitude_pruning(
    model: nn.Module,
    dataloader: Any,
    target_sparsity: float = 0.9,
    num_iterations: int = 10,
    rewind_epoch: int = 0,
    trainer_fn: TrainerFunction | None = None,
    *,
    epochs: int = 10,
    optimizer: str | OptimizerFunction = "sgd",
    learning_rate: float | None = None,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    scheduler: SchedulerFactory | None = None,
    eval_dataloader: Any = None,
    test_dataloader: Any = None,
    eval_every_steps: int | None = None,
    loss_fn: LossFunction | None = None,
    rewind: Rewind = "weights",
    rewind_step: int | None = None,
    prune_fraction: float | None = None,
    scope: Scope = "global",
    criterion: str | ScoreFunction = "magnitude",
    layer_fractions: Mapping[str, float] | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    max_batch_size: int | None = None,
    max_grad_norm: float | None = None,
    gradient_checkpointing: Checkpointing = "auto",
    precision: Precision = "stochastic",
    nonfinite: Nonfinite = "stop",
    max_skipped: float = 0.01,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    save_every_steps: int | None = None,
    seed: int = 0,
    progress: bool = True,
    check_memory: bool = True,
    process_group: ProcessGroup | None = None,
) -> IterativePruningResults:
    r"""Train, prune and rewind for several rounds; the last mask is the ticket.

    With s the target and n rounds, the mask of round i keeps a density of

    $$d_i = (1 - s)^{i / n}$$

    of the N prunable weights: in each round the same share of what is left goes, and the last removes exactly
    `round(s * N)` of them in all. Weights that are pruned stay so; among the others the smallest magnitudes go,
    ties broken by position. In training pruned weights are zero after every step and get no gradient.

    The model comes back as the last ticket, trained, in its own modes and flags and without gradients; the
    caller's random states are left alone. The order of the data and everything else that is random hangs on
    `seed`.

    It takes training's own memory (see `training_bytes`), that of the packed mask, and without `run_dir` that of
    the rewinding point: the weights once more, and the optimizer's state unless the point is 0.

    Args:
        model: Any module, on one device, with the weights to begin with; parameters that require no gradient are
            not trained.
        dataloader: Batches, gone through once an epoch: mappings with what the model takes (and "labels"), or
            pairs (inputs, targets). Also a list of batches, or a single batch.
        target_sparsity: Fraction of the prunable weights that the last mask removes, in (0, 1).
        num_iterations: Rounds. Networks trained: one more, the dense one.
        rewind_epoch: The rewinding point, in epochs.
        trainer_fn: `trainer_fn(model, dataloader, epochs)` trains instead, inside `held`, from the beginning to
            the rewinding point and from there to the end; a number that it returns is recorded for the loss. Its
            optimizer and schedule are its own, made anew in each call.
        epochs: Epochs of the dense network's training; a ticket is trained from the rewinding point to the same
            end.
        optimizer: "sgd", "adam", "adamw" (steps inside the backward pass, so that no gradient outlives it),
            "adamw8bit", or a function from parameters to an optimizer of torch's, called with `lr` too if
            `learning_rate` is given.
        learning_rate: None for 0.01 with SGD, 1e-3 with Adam, 1e-4 with AdamW; of a function, for its own.
        momentum: Of SGD by name.
        weight_decay: Of an optimizer by name.
        scheduler: A function from the torch optimizer to a learning rate scheduler, stepped once a step.
        eval_dataloader: Validation data, for losses, accuracies and the early-stopping step.
        test_dataloader: Test data, measured at the least validation loss and at the end.
        eval_every_steps: Steps between evaluations; None for the end of every epoch.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss, for training and evaluation.
        rewind: "weights", "learning_rate" or "none".
        rewind_step: The rewinding point, in steps, in place of epochs.
        prune_fraction: Each round removes this fraction of the weights that are left, in place of
            `target_sparsity`, which is then without account; the paper's 0.2.
        scope: "global" ranks all prunable weights together, "layer" each tensor by itself.
        criterion: "magnitude", or a function from the trained model to scores by parameter name, whose magnitude
            ranks instead.
        layer_fractions: Glob on parameter names to the fraction of what is left of the tensor that a round
            removes; such tensors are ranked by themselves, and the others make up for the target. The paper gives
            the output layer half the rate of the others.
        include: Widens what is prunable; see `prunable_parameters`.
        exclude: Narrows it.
        max_batch_size: Samples in a forward pass at most; larger batches are split into micro-batches.
        max_grad_norm: Gradients are scaled down to this norm; None for no clipping.
        gradient_checkpointing: Compute activations again in the backward pass: "auto" where the model offers it.
        precision: How bf16 and fp16 weights take up small steps: "stochastic", "compensated" or "nearest".
        nonfinite: At a loss or gradient that is not finite, "stop" with an error, or "skip" the batch.
        max_skipped: Share of the batches that may be skipped, one being allowed in any case.
        run_dir: A folder for the run, which can then be killed at any moment and goes on when called in the same
            way again.
        resume: If False, a folder that holds a run already is an error.
        save_every_steps: Steps between states on disk inside a round; None for the end of every epoch.
        seed: Non-negative integer.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.
        process_group: Ranks that train together, with the same weights and arguments on each: the update is that
            of the batches of all ranks as one, evaluations are those of all ranks' data, and every rank comes to
            the same results. Each is given batches of its own, in training as many as the others; `SharedBatches`
            gives it a share of every one. Rank 0 writes `run_dir`, which all see. None for this process alone, or
            the group of a model in DistributedDataParallel. A model in parts (`fully_shard`) is one of all ranks;
            see docs/distributed.md.

    Returns:
        An `IterativePruningResults`.

    Raises:
        TrainingError: An argument out of range, one that does not go with a model in parts, or two that contradict
            each other; no batches.
        TrainingMemoryError: Memory that does not suffice for a single sample, or that ran out when some weights
            had been updated.
        NonfiniteLossError: A loss or gradient that is not finite, and is not to be skipped.
        SparsityError: A sparsity or fraction out of range, or fractions of layers that the target contradicts.
        ParameterSelectionError: A pattern that matches nothing, or nothing to prune.
        WeightsError: Weights that are NaN after training, scores that do not fit the weights.
        EvaluationError: Evaluation data without batches or labels.
        BatchError: A batch of an unknown form.
        RunFolderError: A folder in use, of another configuration, damaged or not writable.
        MemoryPlanError: More memory is needed than is free.
        DistributedError: A rank failed or has gone, or ranks have other weights, arguments or masks than others.

    Warns:
        LayerCollapseWarning: A tensor lost all its weights.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_iterative_magnitude_pruning
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> inputs = torch.randn(96, 8)
        >>> data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
        >>> train, validation = torch.utils.data.random_split(data, [64, 32])
        >>> results = compute_iterative_magnitude_pruning(
        ...     model,
        ...     torch.utils.data.DataLoader(train, batch_size=16, shuffle=True),
        ...     target_sparsity=0.75,
        ...     num_iterations=2,
        ...     epochs=3,
        ...     learning_rate=0.1,
        ...     eval_dataloader=torch.utils.data.DataLoader(validation, batch_size=32),
        ... )
        >>> [one["sparsity"] for one in results["iterations"]]
        [0.5, 0.75]
        >>> results["final_mask"].kept, int(model[0].weight.count_nonzero() + model[2].weight.count_nonzero())
        (80, 80)

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 1 (identifying winning tickets) and
        appendix B (resetting). Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML
        2020, section 3 (rewinding to step k). Renda, Frankle and Carbin, "Comparing Rewinding and Fine-tuning in
        Neural Network Pruning", ICLR 2020, section 2 (learning rate rewinding).
    """
    model, ranks = joined(model, process_group, "Iterative pruning", sharded=True)
    with ranks.together():
        settings = Settings(
            target_sparsity=target_sparsity,
            num_iterations=num_iterations,
            epochs=epochs,
            rewind=rewind,
            rewind_epoch=rewind_epoch,
            rewind_step=rewind_step,
            prune_fraction=prune_fraction,
            scope=scope,
            criterion=criterion,
            layer_fractions=dict(layer_fractions or {}),
            include=lasting(include),
            exclude=lasting(exclude),
            evaluated=eval_dataloader is not None,
            tested=test_dataloader is not None,
            eval_every_steps=eval_every_steps,
            seed=seed,
        )
        recipe = Recipe(
            optimizer=optimizer,
            learning_rate=learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            scheduler=scheduler,
            loss_fn=loss_fn,
            trainer_fn=trainer_fn,
            max_batch_size=max_batch_size,
            max_grad_norm=max_grad_norm,
            gradient_checkpointing=gradient_checkpointing,
            precision=precision,
            nonfinite=nonfinite,
            max_skipped=max_skipped,
        )
        keepers = {"run_dir": run_dir, "rewind_epoch": rewind_epoch, "rewind_step": rewind_step}
        for keeper in (name for name, given in keepers.items() if given):
            recipe.check_states(model, keeper)
        order = DataOrder(dataloader, seed, ranks)
        settings.check_against(recipe, order.length)
        check_count("save_every_steps", save_every_steps)
        weights = prunable_parameters(model, settings.include, settings.exclude)
        fixed = [name for name, weight in weights.items() if not weight.requires_grad]
        if fixed:
            raise TrainingError(
                f"{fixed[0]} is prunable and requires no gradient, so it would be pruned and never trained. Let "
                "it require one, or leave it out with exclude."
            )
        groups = groups_of(
            {name: weight.numel() for name, weight in weights.items()},
            rounds=num_iterations,
            target_sparsity=target_sparsity,
            prune_fraction=prune_fraction,
            layer_fractions=settings.layer_fractions,
            by_layer=scope == "layer",
        )
        refuse_training_if_too_large(
            "iterative",
            model,
            dataloader,
            recipe,
            check=check_memory and not lies_in_parts(model),  # it counts models that are whole
            include=settings.include,
            exclude=settings.exclude,
            on_disk=run_dir is not None,
            rewind_later=bool(rewind_epoch or rewind_step),
        )
        judge = None
        if eval_dataloader is not None:
            judge = Judge(eval_dataloader, test_dataloader, loss_fn=loss_fn, ranks=ranks)
        with ExitStack() as stack:
            stack.enter_context(private_random_state())
            run = None
            told = configuration("compute_iterative_magnitude_pruning", model, order, settings, recipe)
            check_alike(ranks, told, model)
            if run_dir is not None:
                run = stack.enter_context(RunFolder.open(run_dir, told, resume=resume, ranks=ranks))
            stack.enter_context(training(model))
            checkpointing = stack.enter_context(checkpointed(model, gradient_checkpointing))
            trainings = Trainings(model, dataloader, order, settings, recipe, judge, checkpointing, ranks)
            experiment = Experiment(
                trainings, groups, run, save_every_steps=save_every_steps, progress=progress and ranks.first
            )
            experiment.run()
            results = experiment.results()
    del experiment
    let_go(ranks)
    return results
