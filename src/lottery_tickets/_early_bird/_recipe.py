"""How a model is trained between checks: by our trainer, or by a function of the user's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import nn

from lottery_tickets._batches import LossFunction, size_of
from lottery_tickets._early_bird._settings import check_count, check_number
from lottery_tickets.errors import TrainingError
from lottery_tickets.training import (
    Checkpointing,
    Nonfinite,
    Precision,
    SchedulerFactory,
    Trainer,
    log_training_bytes,
    make_optimizer,
    training_bytes,
)

_log = logging.getLogger(__name__)

TrainerFunction = Callable[[nn.Module, Any, int], Any]
OptimizerFunction = Callable[..., torch.optim.Optimizer]

# Where nothing is said.
LEARNING_RATES = {"sgd": 0.01, "adamw": 1e-4, "adamw8bit": 1e-4}


@dataclass(frozen=True)
class Recipe:
    """The arguments of `compute_early_bird_tickets` that say how to train, under their names there."""

    trainer_fn: TrainerFunction | None
    max_batch_size: int | None
    learning_rate: float | None
    use_sgd: bool
    optimizer: str | OptimizerFunction | None
    scheduler: SchedulerFactory | None
    loss_fn: LossFunction | None
    gradient_checkpointing: Checkpointing
    max_grad_norm: float | None
    momentum: float
    weight_decay: float
    precision: Precision
    nonfinite: Nonfinite
    max_skipped: float

    def __post_init__(self) -> None:
        """Raise TrainingError for what cannot be."""
        if self.trainer_fn is not None:
            if not callable(self.trainer_fn):
                raise TrainingError(
                    f"trainer_fn is a function (model, dataloader, epochs), got {self.trainer_fn!r}."
                )
            self._refuse_what_trainer_fn_does()
        check_count("max_batch_size", self.max_batch_size)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, least=0)
        if self.nonfinite not in get_args(Nonfinite):
            raise TrainingError(f"nonfinite is 'stop' or 'skip', got {self.nonfinite!r}.")
        check_number("max_skipped", self.max_skipped, least=0, most=1)

    @property
    def kind(self) -> str | OptimizerFunction:
        """The optimizer, by name or as a function."""
        if self.optimizer is not None:
            return self.optimizer
        return "sgd" if self.use_sgd else "adamw"

    def trainer(self, model: nn.Module, seed: int, *, checkpointing: bool) -> Trainer:
        """Ours, for the parameters that require gradients; it tells what memory it will take before it starts."""
        optimizer = make_optimizer(
            self._make if callable(self.kind) else self.kind,
            model.named_parameters(),
            lr=self._rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            precision=self.precision,
            seed=seed,
        )
        return Trainer(
            model,
            optimizer,
            scheduler=self.scheduler,
            loss_fn=self.loss_fn,
            max_batch_size=self.max_batch_size,
            nonfinite=self.nonfinite,
            max_skipped=self.max_skipped,
            announce=partial(self._tell_memory, model, checkpointing),
        )

    def _tell_memory(self, model: nn.Module, checkpointing: bool, batch: Any) -> None:
        if self.kind not in LEARNING_RATES:
            _log.info("What memory training by %r takes is not known beforehand.", self.kind)
            return
        size = size_of(batch)
        rows = min(size, self.max_batch_size or size)
        predicted = training_bytes(
            model,
            batch_size=max(1, rows),
            sequence_length=_length_of(batch),
            optimizer=cast("Any", self.kind),
            momentum=self.momentum,
            precision=self.precision,
            micro_batches=rows < size,
            checkpointing=checkpointing,
        )
        log_training_bytes(predicted)

    @property
    def _rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES.get(self.kind, 0.0) if isinstance(self.kind, str) else 0.0

    def _make(self, named: list[tuple[str, nn.Parameter]], *, lr: float) -> torch.optim.Optimizer:
        """The user's optimizer; a learning rate that was not given is the function's own affair."""
        assert callable(self.kind)
        options = {} if self.learning_rate is None else {"lr": lr}
        made = self.kind([parameter for _, parameter in named], **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise TrainingError(
                "optimizer is a name, or a function from parameters to an optimizer of torch's; it returned "
                f"{type(made).__name__}."
            )
        return made

    def _refuse_what_trainer_fn_does(self) -> None:
        ours = {
            "optimizer": None,
            "scheduler": None,
            "loss_fn": None,
            "learning_rate": None,
            "max_batch_size": None,
            "use_sgd": True,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "gradient_checkpointing": "auto",
        }
        given = [name for name, unset in ours.items() if getattr(self, name) != unset]
        if given:
            raise TrainingError(
                f"trainer_fn trains by itself, and {', '.join(given)} would say how. Leave out one or the other."
            )


def _length_of(batch: Any) -> int:
    """Tokens of a sample; 1 where a sample is no sequence of tokens."""
    inputs = batch if isinstance(batch, Mapping) else batch[0]
    if isinstance(inputs, Mapping):
        inputs = inputs.get("input_ids")
    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
        return 1
    return max(1, inputs.shape[1])
