"""A search from beginning to end: what is prepared for it and put back after it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from lottery_tickets._early_bird._results import EarlyBirdResults, EarlyBirdTraining
from lottery_tickets._early_bird._search import Search, TrainEpochs
from lottery_tickets._early_bird._settings import Settings
from lottery_tickets._early_bird._subject import Channels, Subject, Weights
from lottery_tickets._early_bird._watch import Watch
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.planning import refuse_training_if_too_large
from lottery_tickets.runs import RunFolder, private_random_state
from lottery_tickets.training import (
    DataOrder,
    Recipe,
    Trainer,
    check_alike,
    checkpointed,
    configuration,
    lies_in_parts,
    peak_bytes,
    training,
)


def find_birds(
    model: nn.Module,
    dataloader: Any,
    settings: Settings,
    recipe: Recipe,
    *,
    run_dir: str | os.PathLike[str] | None,
    resume: bool,
    save_masks: bool,
    progress: bool,
    check_memory: bool = True,
    ranks: Ranks | None = None,
) -> list[EarlyBirdResults]:
    """A search from beginning to end; see `compute_early_bird_tickets`."""
    if save_masks and run_dir is None:
        raise TrainingError("save_masks=True keeps the masks in run_dir, and there is none. Give run_dir.")
    if recipe.trainer_fn is not None and settings.check_every_steps is not None:
        raise TrainingError(
            f"trainer_fn trains whole epochs, so check_every_steps={settings.check_every_steps} cannot be kept. "
            "Use check_interval."
        )
    ranks, sharded = ranks or Ranks(), lies_in_parts(model)
    if sharded:
        _check_sharded(settings, recipe)
    if run_dir is not None:
        recipe.check_states(model, "run_dir")
    order = DataOrder(dataloader, settings.seed, ranks)
    subject: Subject = Weights(model, settings)
    if settings.structure is not None:
        with private_random_state():
            subject = Channels(model, settings.structure, next(order.epoch(0)))
    watch = Watch(
        subject, settings, Path(run_dir) / "masks" if save_masks and run_dir is not None else None, ranks
    )
    if recipe.trainer_fn is None and not any(parameter.requires_grad for parameter in model.parameters()):
        watch.look(epoch=0, step=0, train_loss=None, seconds=0.0, peak_bytes=peak_bytes(model))
        return watch.results(
            "weights are not moving: no parameter requires gradients, so nothing was trained",
            EarlyBirdTraining(steps=0, skipped=0, mean_loss=None),
        )
    refuse_training_if_too_large(
        "early-bird",
        model,
        dataloader,
        recipe,
        check=check_memory and not sharded,  # it counts models that are whole
        include=settings.include,
        exclude=settings.exclude,
        criterion=settings.criterion,
        masks=len(settings.sparsities),
    )
    with ExitStack() as stack:
        stack.enter_context(private_random_state())
        run = None
        told = configuration("compute_early_bird_tickets", model, order, settings, recipe)
        check_alike(ranks, told, model)
        if run_dir is not None:
            run = stack.enter_context(RunFolder.open(run_dir, told, resume=resume, ranks=ranks))
        stack.enter_context(training(model))
        trainer: Trainer | TrainEpochs
        if recipe.trainer_fn is None:
            checkpointing = stack.enter_context(checkpointed(model, recipe.gradient_checkpointing))
            trainer = recipe.trainer(model, settings.seed, checkpointing=checkpointing, ranks=ranks)
        else:
            trainer = recipe.calls(model, dataloader, ranks)
        search = Search(model, settings, order, watch, trainer, run, progress=progress and ranks.first)
        search.run()
        return search.results()


def _check_sharded(settings: Settings, recipe: Recipe) -> None:
    """Refuse what is not known of a model in parts."""
    if settings.criterion == "rank_correlation":
        raise TrainingError(
            "criterion='rank_correlation' ranks whole tensors, and this model lies in parts on the ranks. Use "
            "'window' or 'queue'."
        )
    if settings.structure is not None or recipe.bn_l1:
        raise TrainingError(
            "structure traces whole models and bn_l1 sums whole scales, and this model lies in parts on ranks. "
            "Leave them out, or give the model before it is sharded."
        )
