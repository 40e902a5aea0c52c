"""Is training settled enough to rewind to: barriers between networks that were trained from the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import nn

from lottery_tickets._batches import LossFunction
from lottery_tickets._stability._connectivity import Measuring, barrier_of, measure_path
from lottery_tickets._stability._ends import State

__all__ = ["LinearModeConnectivity", "compute_linear_mode_connectivity"]


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
    measured = measure_path(model, state_a, state_b, measuring, mask)
    return LinearModeConnectivity(
        alphas=measured.alphas,
        losses=measured.losses,
        errors=measured.errors,
        loss_barrier=barrier_of(measured.losses),
        error_barrier=None if measured.errors is None else barrier_of(measured.errors),
    )
