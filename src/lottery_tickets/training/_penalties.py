"""What is added to a loss for the sake of the ticket."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from lottery_tickets.errors import TrainingError


def scale_penalty(model: nn.Module, strength: float) -> Callable[[], torch.Tensor] | None:
    """`strength` times the sum of the absolute scales of batch normalisation; None for no strength.

    It drives scales of channels that are not needed to zero, so that they tell channels apart.

    Raises:
        TrainingError: The model has no such scales that are trained.

    References:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, equation 1.
    """
    if not strength:
        return None
    scales = [
        module.weight
        for module in model.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        and module.weight is not None
        and module.weight.requires_grad
    ]
    if not scales:
        raise TrainingError(
            f"bn_l1={strength} is a penalty on the scales of batch normalisation, and {type(model).__name__} has "
            "none that are trained. Leave it out."
        )
    return partial(_penalty, scales, strength)


def _penalty(scales: list[nn.Parameter], strength: float) -> torch.Tensor:
    return strength * torch.stack([scale.abs().sum() for scale in scales]).sum()
