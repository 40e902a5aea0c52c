"""Running statistics of BatchNorm layers, measured anew for the weights that stand before them now."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lottery_tickets._batches import evaluating, run
from lottery_tickets.errors import EvaluationError


def layers_with_statistics(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics.

    Raises:
        EvaluationError: There are none.
    """
    layers = [one for one in model.modules() if isinstance(one, _BatchNorm) and one.running_mean is not None]
    if not layers:
        raise EvaluationError(
            f"recompute_batchnorm: {type(model).__name__} has no BatchNorm layer with running statistics, so "
            "there is nothing to recompute. Leave it out."
        )
    return layers


def recompute_statistics(model: nn.Module, batches: Iterable[Any]) -> None:
    """Mean and variance of each layer as the average over the batches, each weighing the same.

    `torch.optim.swa_utils.update_bn` does so for models without other layers that behave differently in training,
    and for batches that are tensors; here only the BatchNorm layers are in training mode, so dropout is off, and
    batches may have any usual form.

    Raises:
        EvaluationError: No BatchNorm layers, or no batches.
        BatchError: A batch of an unknown form.
    """
    layers = layers_with_statistics(model)
    momenta = [layer.momentum for layer in layers]
    seen = 0
    with evaluating(model):  # it puts the training flags back too
        try:
            for layer in layers:
                layer.reset_running_stats()
                layer.momentum = None  # torch's word for the plain average
                layer.training = True
            for batch in batches:
                run(model, batch)
                seen += 1
        finally:
            for layer, momentum in zip(layers, momenta, strict=True):
                layer.momentum = momentum
    if not seen:
        raise EvaluationError("recompute_batchnorm: no batches came to measure the statistics on.")
