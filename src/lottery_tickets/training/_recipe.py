"""How a model is trained: by our trainer, or by a function of the user's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast, get_args

import torch
from torch import nn

from lottery_tickets._arguments import check_count, check_number
from lottery_tickets._batches import LossFunction, size_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.training._activations import Checkpointing
from lottery_tickets.training._joined import lies_in_parts
from lottery_tickets.training._memory import log_training_bytes, training_bytes
from lottery_tickets.training._optimizers import make_optimizer
from lottery_tickets.training._penalties import scale_penalty
from lottery_tickets.training._trainer import Nonfinite, SchedulerFactory, Trainer
from lottery_tickets.training._weights import Precision

_log = logging.getLogger(__name__)

TrainerFunction = Callable[[nn.Module, Any, int], Any]
OptimizerFunction = Callable[..., torch.optim.Optimizer]

# Where nothing is said.
LEARNING_RATES = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-4, "adamw8bit": 1e-4}


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        optimizer: "sgd", "adam", "adamw", "adamw8bit", or a function from parameters to an optimizer of torch's,
            called with `lr` too if there is a learning rate.
        learning_rate: None for the name's own in `LEARNING_RATES`, or the function's.
        momentum: Of SGD by name.
        weight_decay: Of an optimizer by name.
        scheduler: A function from the torch optimizer to a learning rate scheduler, stepped once a step.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss.
        trainer_fn: `trainer_fn(model, dataloader, epochs)`, which trains by itself.
        max_batch_size: Samples in a forward pass at most.
        max_grad_norm: Gradients are scaled down to this norm; None for no clipping.
        gradient_checkpointing: Whether to compute activations again in the backward pass.
        precision: How weights of two bytes take up small steps.
        nonfinite: What to do at a loss or gradient that is not finite.
        max_skipped: Share of the batches that may be skipped.
        bn_l1: Strength of an L1 penalty on the scales of batch normalisation, which no reported loss holds.

    Raises:
        TrainingError: What cannot be.
    """

    optimizer: str | OptimizerFunction = "sgd"
    learning_rate: float | None = None
    momentum: float = 0.0
    weight_decay: float = 0.0
    scheduler: SchedulerFactory | None = None
    loss_fn: LossFunction | None = None
    trainer_fn: TrainerFunction | None = None
    max_batch_size: int | None = None
    max_grad_norm: float | None = None
    gradient_checkpointing: Checkpointing = "auto"
    precision: Precision = "stochastic"
    nonfinite: Nonfinite = "stop"
    max_skipped: float = 0.01
    bn_l1: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
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
        check_number("bn_l1", self.bn_l1, least=0)

    def trainer(
        self,
        model: nn.Module,
        seed: int,
        *,
        checkpointing: bool = False,
        scheduled: bool = True,
        ranks: Ranks | None = None,
    ) -> Trainer:
        """Ours, for the parameters that require gradients; it tells what memory it will take before it starts.

        Args:
            model: To be trained.
            seed: Of stochastic rounding.
            checkpointing: Whether the model computes activations again.
            scheduled: If False, the learning rate stays what it is.
            ranks: See `Trainer`.
        """
        optimizer = make_optimizer(
            self._make if callable(self.optimizer) else self.optimizer,
            model.named_parameters(),
            lr=self._rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            precision=self.precision,
            seed=seed,
            ranks=ranks,
        )
        return Trainer(
            model,
            optimizer,
            scheduler=self.scheduler if scheduled else None,
            loss_fn=self.loss_fn,
            max_batch_size=self.max_batch_size,
            nonfinite=self.nonfinite,
            max_skipped=self.max_skipped,
            announce=partial(self._tell_memory, model, checkpointing),
            ranks=ranks,
            penalty=scale_penalty(model, self.bn_l1),
        )

    def check_states(self, model: nn.Module, keeper: str) -> None:
        """Refuse states that cannot be told of the whole, of a model in parts.

        Args:
            model: To be trained.
            keeper: The argument for which states are kept.

        Raises:
            TrainingError: They cannot.
        """
        if self.optimizer == "adamw8bit" and lies_in_parts(model):
            raise TrainingError(
                f"optimizer='adamw8bit' scales its states by blocks of a part's weights, and {keeper} asks for "
                "states that any number of ranks can go on with. Take 'adamw', or a model that is not sharded."
            )

    def calls(self, model: nn.Module, dataloader: Any, ranks: Ranks) -> Callable[[int], Any]:
        """The user's function, of the number of epochs; of what ends it on one rank the others learn."""
        assert self.trainer_fn is not None
        train = partial(self.trainer_fn, model, dataloader)
        if not lies_in_parts(model):
            return train

        def watched(epochs: int) -> Any:
            with ranks.watched("trainer_fn"):
                return train(epochs)

        return watched

    def _tell_memory(self, model: nn.Module, checkpointing: bool, batch: Any) -> None:
        if self.optimizer not in LEARNING_RATES:
            _log.info("What memory training by %r takes is not known beforehand.", self.optimizer)
            return
        size = size_of(batch)
        rows = min(size, self.max_batch_size or size)
        predicted = training_bytes(
            model,
            batch_size=max(1, rows),
            sequence_length=length_of(batch),
            optimizer=cast("Any", self.optimizer),
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
        return LEARNING_RATES.get(self.optimizer, 0.0) if isinstance(self.optimizer, str) else 0.0

    def _make(self, named: list[tuple[str, nn.Parameter]], *, lr: float) -> torch.optim.Optimizer:
        """The user's optimizer; a learning rate that was not given is the function's own affair."""
        assert callable(self.optimizer)
        options = {} if self.learning_rate is None else {"lr": lr}
        made = self.optimizer([parameter for _, parameter in named], **options)
        if not isinstance(made, torch.optim.Optimizer):
            raise TrainingError(
                "optimizer is a name, or a function from parameters to an optimizer of torch's; it returned "
                f"{type(made).__name__}."
            )
        return made

    def _refuse_what_trainer_fn_does(self) -> None:
        ours = {
            "optimizer": "sgd",
            "scheduler": None,
            "loss_fn": None,
            "learning_rate": None,
            "max_batch_size": None,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "gradient_checkpointing": "auto",
            "bn_l1": 0.0,
        }
        given = [name for name, unset in ours.items() if getattr(self, name) != unset]
        if given:
            raise TrainingError(
                f"trainer_fn trains by itself, and {', '.join(given)} would say how. Leave out one or the other."
            )


def length_of(batch: Any) -> int:
    """Tokens of a sample; 1 where a sample is no sequence of tokens."""
    inputs = batch if isinstance(batch, Mapping) else batch[0]
    if isinstance(inputs, Mapping):
        inputs = inputs.get("input_ids")
    if not isinstance(inputs, torch.Tensor) or inputs.dim() != 2 or inputs.is_floating_point():
        return 1
    return max(1, inputs.shape[1])
