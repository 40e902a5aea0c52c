"""Is training settled enough to rewind to: barriers between networks that were trained from the same weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, get_args

import torch
from torch import nn

from lottery_tickets._arguments import check_count, check_number
from lottery_tickets._batches import LossFunction
from lottery_tickets._stability._connectivity import Measuring, barrier_of, measure_path
from lottery_tickets._stability._ends import State
from lottery_tickets._stability._experiment import MaskOfRun, analysing, checked_settings
from lottery_tickets._stability._results import (
    Instability,
    InstabilityPoint,
    Metric,
    SiblingPair,
    having,
    summarised,
)
from lottery_tickets._stability._train import TrainFunction, Training
from lottery_tickets.errors import TrainingError
from lottery_tickets.planning import refuse_if_too_large
from lottery_tickets.training import (
    Checkpointing,
    Nonfinite,
    OptimizerFunction,
    Precision,
    Recipe,
    SchedulerFactory,
)

__all__ = [
    "Instability",
    "InstabilityPoint",
    "LinearModeConnectivity",
    "SiblingPair",
    "TrainFunction",
    "compute_instability",
    "compute_linear_mode_connectivity",
    "make_train_function",
]


class LinearModeConnectivity(TypedDict):
    """What `compute_linear_mode_connectivity` returns.

    Attributes:
        alphas: Points on the path, from 0.0 (`state_a`) to 1.0 (`state_b`), evenly spaced.
        losses: Mean loss at each.
        errors: 1 - accuracy at each; None where the data has no classes to be right about.
        loss_barrier: Largest loss minus the mean of those of the two ends; never negative.
        error_barrier: The same of the errors; None without errors.
    """

    alphas: list[float]
    losses: list[float]
    errors: list[float] | None
    loss_barrier: float
    error_barrier: float | None


def compute_linear_mode_connectivity(
    model: nn.Module,
    state_a: State,
    state_b: State,
    dataloader: Any,
    points: int = 11,
    mask: Mapping[str, torch.Tensor] | None = None,
    *,
    recompute_batchnorm: Any = False,
    loss_fn: LossFunction | None = None,
    seed: int = 0,
    progress: bool = True,
    check_memory: bool = True,
) -> LinearModeConnectivity:
    """Loss and error on the straight line between two states of a model, and the height of the barrier there.

    With E the loss or the error at weights W, and the path `W(alpha) = (1 - alpha) W_a + alpha W_b`, the barrier
    is `max over alpha of E(W(alpha)) - (E(W_a) + E(W_b)) / 2`. The maximum is over the points measured, so the
    barrier is at least this high; ends of different height alone make half of their difference.

    Each point is written into the model's own memory, tensor by tensor, computed in float32 at least and rounded
    to the model's data type; the ends are those of the states bit for bit. Buffers such as running statistics lie
    on the line too; tensors that are not floating point are those of `state_a`, at the other end of `state_b`. A
    buffer that `state_dict()` leaves out takes part if both states have it. The model comes back bit for bit,
    whatever happens.

    Extra memory: a copy of the model's tensors, without those that are the same as in a state that lies elsewhere.
    A state that is the model's own tensors counts as one to be copied, and its copy brings the model back; files
    are read from disk again for every point.

    Args:
        model: Any module, on one device.
        state_a: Name to tensor, as `model.state_dict()` or `training.tensors_of(model)` give, or the path of a
            safetensors file of that; names, shapes and data types are the model's. A tied tensor may stand under
            any of its names.
        state_b: The other end.
        dataloader: Batches, gone through once for every point, in an order that hangs on `seed` alone: any usual
            form, a single batch too. Those of an iterator are held.
        points: How many, ends included; at least 2.
        mask: A `Mask` or a plain dict of tensors, by which both states are masked before: the path stays inside
            the ticket.
        recompute_batchnorm: Measure the running statistics of BatchNorm layers anew at every point, the ends too,
            as the plain average over one pass of these batches, no other layer being in training mode. True for
            those of `dataloader`.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss; there are no errors then.
        seed: Of the order of the batches, where the loader has one that is random. Non-negative integer.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is done if more memory is needed than is free; see `plan_memory`.

    Returns:
        A `LinearModeConnectivity`.

    Raises:
        EvaluationError: Fewer than two points, no batches, a loss that is not finite (the message says where), or
            statistics to recompute where no layer has any.
        StateMismatchError: A state whose names, shapes or data types are not the model's.
        MaskMismatchError: A mask with names or shapes that the model does not have.
        WeightsError: A state with NaN or infinite values, or tensors on the meta device.
        CheckpointError: A file that is not a whole safetensors file.
        BatchError: A batch of an unknown form.
        MemoryPlanError: More memory is needed than is free.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_linear_mode_connectivity
        >>> model = torch.nn.Linear(1, 1, bias=False)  # loss (1 - w)^2, so this path leads through a valley
        >>> ends = [{"weight": torch.tensor([[w]])} for w in (0.0, 2.0)]
        >>> batch = (torch.ones(1, 1), torch.ones(1, 1))
        >>> path = compute_linear_mode_connectivity(model, *ends, batch, points=3)
        >>> path["alphas"], path["losses"], path["loss_barrier"]
        ([0.0, 0.5, 1.0], [1.0, 0.0, 1.0], 0.0)

    References:
        Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML
        2020, arXiv 1912.05671, section 2: error barrier height, there on 30 points. Izmailov et al., "Averaging
        Weights Leads to Wider Optima and Better Generalization", UAI 2018, arXiv 1803.05407, section 3.2:
        BatchNorm statistics are recomputed for weights that no training has passed through.
    """
    measuring = Measuring(
        dataloader,
        points=points,
        recompute_batchnorm=recompute_batchnorm,
        loss_fn=loss_fn,
        seed=seed,
        progress=progress,
    )
    refuse_if_too_large("connectivity", model, dataloader, check=check_memory)
    measured = measure_path(model, state_a, state_b, measuring, mask)
    return LinearModeConnectivity(
        alphas=measured.alphas,
        losses=measured.losses,
        errors=measured.errors,
        loss_barrier=barrier_of(measured.losses),
        error_barrier=None if measured.errors is None else barrier_of(measured.errors),
    )


def compute_instability(
    make_model: Callable[[int], nn.Module],
    train: TrainFunction,
    rewind_steps: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    *,
    dataloader: Any,
    points: int = 11,
    mask: Mapping[str, torch.Tensor] | MaskOfRun | None = None,
    recompute_batchnorm: Any = False,
    loss_fn: LossFunction | None = None,
    metric: Metric = "error",
    threshold: float = 0.02,
    confidence: float = 0.95,
    run_dir: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
    check_memory: bool = True,
) -> Instability:
    """How far apart the order of the data drives networks that agree until step k: which step to rewind to.

    For every seed a network is trained to the first step k, and two copies of it from there to the end, each in
    an order of its own; then the network itself from k on to the next step, so that nothing is trained twice. The
    instability at k is the barrier on the line between the two copies; its mean over seeds makes the curve. Where
    it is next to nothing, the order of the data no longer decides in which valley training ends. In the paper
    tickets do as well as the dense network where they, trained as tickets (`mask`), are stable in this sense.

    The network's own order has its seed, as in iterative pruning; `sibling_seeds` in the results has those of the
    copies. A copy that starts in the middle of an epoch takes the rest of that epoch from its own order.

    Memory beside the model, its training and the data: three copies of the model's tensors, and two of the state
    that `train` returns.

    Args:
        make_model: `make_model(seed)` gives a new network with the initial weights of that seed, on its device;
            torch's random state is seeded with it before.
        train: `train(model, start=, stop=, seed=, state=)` trains in place and returns what the next call needs;
            see `TrainFunction`. `make_train_function` makes one.
        rewind_steps: Optimizer steps k to look at, each once, in any order; 0 is the initial network.
        seeds: Each a network of its own; at least two for intervals.
        dataloader: Batches to measure loss and error on: any usual form.
        points: On each path, ends included.
        mask: A ticket that the copies are trained as, their pruned weights held at zero, and the path inside it: a
            `Mask`, a dict of tensors, or a function `(seed, step)` to one, since a ticket belongs to its network.
        recompute_batchnorm: As for `compute_linear_mode_connectivity`.
        loss_fn: Likewise.
        metric: Whose barrier is compared with the threshold: "error" or "loss".
        threshold: Below it a network counts as stable; 0.02 is the paper's, of the error.
        confidence: Of the intervals, in (0, 1).
        run_dir: A folder for the run: every finished pair is written there, and the network it left. Called in the
            same way again after a kill, it goes on after the last pair; `metric`, `threshold` and `confidence` may
            change.
        resume: If False, a folder that holds a run already is an error.
        progress: Show a bar on anything that takes over two seconds.
        check_memory: Refuse before anything is trained if more memory is needed than is free; see `plan_memory`.

    Returns:
        An `Instability`.

    Raises:
        TrainingError: Steps or seeds that are none, a step beyond the end of training, copies that come out the
            same because `train` has only one order, or an argument out of range.
        EvaluationError: Data that cannot be measured on, or errors asked for where there are no classes.
        WeightsError: A training that ended with NaN or infinite weights.
        MaskMismatchError: A mask that is not of these networks.
        MemoryPlanError: More memory is needed than is free.
        RunFolderError: A folder in use, of another configuration, damaged or not writable; or a state of `train`
            that cannot be written.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_instability
        >>> from lottery_tickets.stability import make_train_function
        >>> _ = torch.manual_seed(0)
        >>> inputs = torch.randn(32, 8)
        >>> data = torch.utils.data.TensorDataset(inputs, (inputs[:, 0] > 0).long())
        >>> loader = torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
        >>> def make_model(seed):
        ...     return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> train = make_train_function(loader, epochs=2, learning_rate=0.1)
        >>> found = compute_instability(make_model, train, [0, 4], seeds=[0, 1], dataloader=loader)
        >>> [point["rewind_step"] for point in found["curve"]], found["rewind_step"]
        ([0, 4], 0)

    References:
        Frankle, Dziugaite, Roy and Carbin, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", ICML
        2020, arXiv 1912.05671: section 2 and algorithm 1 (instability analysis; below 2% counts as stable),
        section 3 (dense networks), section 4 and algorithm 2 (tickets rewound to step k). Student's t interval
        over seeds is ours.
    """
    settings = checked_settings(rewind_steps, seeds, mask)
    if metric not in get_args(Metric):
        raise TrainingError(f"metric is 'error' or 'loss', got {metric!r}.")
    check_number("threshold", threshold, least=0)
    if not 0 < confidence < 1:
        raise TrainingError(f"confidence is a number between 0 and 1, got {confidence!r}.")
    measuring = Measuring(
        dataloader,
        points=points,
        recompute_batchnorm=recompute_batchnorm,
        loss_fn=loss_fn,
        seed=0,
        progress=progress,
    )
    analysis = analysing(
        make_model,
        train,
        settings,
        measuring,
        mask,
        run_dir=run_dir,
        resume=resume,
        check_memory=check_memory,
    )
    with analysis as experiment:
        pairs = [having(metric, pair) for pair in experiment.pairs()]
    return summarised(pairs, metric=metric, threshold=threshold, confidence=confidence)


def make_train_function(
    dataloader: Any,
    epochs: int,
    *,
    learning_rate: float | None = None,
    optimizer: str | OptimizerFunction = "sgd",
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    scheduler: SchedulerFactory | None = None,
    loss_fn: LossFunction | None = None,
    max_batch_size: int | None = None,
    max_grad_norm: float | None = None,
    gradient_checkpointing: Checkpointing = "auto",
    precision: Precision = "stochastic",
    nonfinite: Nonfinite = "stop",
    max_skipped: float = 0.01,
) -> TrainFunction:
    """A function for `compute_instability` that trains as iterative pruning and early-bird detection do.

    Left at a step and gone on with under the same seed, training ends with the bits of one that was not left.
    Gone on with under another seed, it takes optimizer, schedule and place in the data along, and the rest of the
    epoch from the other order.

    Args:
        dataloader: Batches, gone through once an epoch; it has to shuffle.
        epochs: The whole training, from step 0.
        learning_rate: None for the optimizer's own default.
        optimizer: "sgd", "adam", "adamw", "adamw8bit", or a function from parameters to an optimizer of torch's.
        momentum: Of SGD.
        weight_decay: Of an optimizer by name.
        scheduler: A function from the torch optimizer to a learning rate scheduler, stepped once a step.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss.
        max_batch_size: Samples in a forward pass at most.
        max_grad_norm: Gradients are scaled down to this norm.
        gradient_checkpointing: "auto", True or False.
        precision: How bf16 and fp16 weights take up small steps.
        nonfinite: "stop" or "skip" at a loss or gradient that is not finite.
        max_skipped: Share of the batches that may be skipped.

    Returns:
        A `TrainFunction`.

    Raises:
        TrainingError: An argument out of range.
        BatchError: Data of an unknown form.

    Example:
        >>> import torch
        >>> from lottery_tickets.stability import make_train_function
        >>> batches = [(torch.ones(2, 3), torch.ones(2, 1))] * 4
        >>> train = make_train_function(batches, epochs=1)
        >>> model = torch.nn.Linear(3, 1)
        >>> state = train(model, start=0, stop=3, seed=0)
        >>> train(model, start=3, stop=None, seed=1, state=state)["point"]["step"]
        4
    """
    check_count("epochs", epochs)
    recipe = Recipe(
        optimizer=optimizer,
        learning_rate=learning_rate,
        momentum=momentum,
        weight_decay=weight_decay,
        scheduler=scheduler,
        loss_fn=loss_fn,
        max_batch_size=max_batch_size,
        max_grad_norm=max_grad_norm,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
        nonfinite=nonfinite,
        max_skipped=max_skipped,
    )
    return Training(dataloader, epochs, recipe)
