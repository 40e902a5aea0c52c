"""The trainings of the rounds: from the beginning, and from the rewinding point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lottery_tickets._iterative._calls import Calls
from lottery_tickets._iterative._rewinding import Options, RewindPoint
from lottery_tickets._iterative._settings import Settings
from lottery_tickets._ranks import Ranks
from lottery_tickets.masks import reshard
from lottery_tickets.training import Course, DataOrder, Judge, Recipe, Trainer


@dataclass(frozen=True)
class Trainings:
    """What all of them share.

    Attributes:
        model: In training mode.
        dataloader: For `trainer_fn`.
        order: The data.
        settings: What is rewound.
        recipe: How to train.
        judge: Measures; None for none.
        checkpointing: Whether the model computes activations again.
        ranks: Who trains together.
    """

    model: nn.Module
    dataloader: Any
    order: DataOrder
    settings: Settings
    recipe: Recipe
    judge: Judge | None
    checkpointing: bool
    ranks: Ranks

    def new(self, rewind: RewindPoint | None = None, last_options: Options | None = None) -> Course | Calls:
        """A training of the model as it is.

        Args:
            rewind: The rewinding point to begin at; None for the beginning.
            last_options: Of the optimizer at the end of the dense network's training, for fine-tuning.
        """
        reshard(self.model)  # which a criterion's passes may have left whole
        settings, recipe = self.settings, self.recipe
        start = None if rewind is None else rewind.point
        if recipe.trainer_fn is not None:
            return Calls(
                *(self.model, recipe.calls(self.model, self.dataloader, self.ranks), self.order),
                epochs=settings.epochs,
                halt=settings.rewind_epoch,
                judge=self.judge,
                start=start,
            )
        return Course(
            *(self.model, self._trainer(rewind, last_options or []), self.order),
            epochs=settings.epochs,
            judge=self.judge,
            eval_every_steps=settings.eval_every_steps,
            start=start,
        )

    def _trainer(self, rewind: RewindPoint | None, last_options: Options) -> Trainer:
        fine_tuning = rewind is not None and self.settings.rewind == "none"
        trainer = self.recipe.trainer(
            self.model,
            self.settings.seed,
            checkpointing=self.checkpointing,
            scheduled=not fine_tuning,
            ranks=self.ranks,
        )
        if rewind is None:
            return trainer
        own, there = trainer.state(), rewind.training["trainer"]
        if self.settings.rewind == "weights":
            trainer.load({**there, "progress": own["progress"]})
        elif self.settings.rewind == "learning_rate":
            trainer.load({**own, "scheduler": there["scheduler"]})
        options = last_options if fine_tuning else rewind.options
        for group, given in zip(trainer.optimizer.param_groups, options, strict=True):
            group.update(given)
        return trainer


def options_of(course: Course | Calls) -> Options:
    """What a scheduler may have changed in the optimizer's groups; nothing is known of a user's."""
    if isinstance(course, Calls):
        return []
    parameters = {"params", "param_names"}
    groups = course.trainer.optimizer.param_groups
    return [{name: one for name, one in group.items() if name not in parameters} for group in groups]
