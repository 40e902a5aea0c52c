"""The early-bird ticket as a control: drawn from the same weights and data, at the ticket's sparsity."""

from __future__ import annotations

from typing import Any

from torch import nn

from lottery_tickets._early_bird._settings import checked_settings
from lottery_tickets._early_bird._whole import find_birds
from lottery_tickets.masks import Mask, parameters_of, prunable_parameters
from lottery_tickets.training import Recipe


def early_bird(
    model: nn.Module,
    train_data: Any,
    ticket: Mask,
    recipe: Recipe,
    *,
    epochs: int,
    seed: int,
    progress: bool,
    check_memory: bool = True,
) -> tuple[Mask, int | None]:
    """The mask, and the epoch at which it had settled; the model is trained by it.

    It prunes the tensors that the ticket prunes, and keeps as many weights.
    """
    own = {id(parameter) for parameter in parameters_of(model, ticket).values()}

    def pruned(_: str, parameter: nn.Parameter) -> bool:
        return id(parameter) in own

    def left_alone(_: str, parameter: nn.Parameter) -> bool:
        return id(parameter) not in own

    too_many = len(prunable_parameters(model, include=pruned)) > len(own)
    settings = checked_settings(
        ticket.sparsity,
        "window",
        use_magnitude_ranking=False,
        convergence_threshold=None,
        stability_window=None,
        max_epochs=epochs,
        check_interval=1,
        check_every_steps=None,
        include=pruned,
        exclude=left_alone if too_many else None,  # a pattern that matches nothing is an error
        seed=seed,
    )
    (found,) = find_birds(
        model,
        train_data,
        settings,
        recipe,
        run_dir=None,
        resume=True,
        save_masks=False,
        progress=progress,
        check_memory=check_memory,
    )
    return found["final_mask"], found["convergence_epoch"]
