"""One optimizer step after another, each of them whole or not at all.

Hugging Face's accelerate would bring devices, mixed precision and process groups; here there is one device, the
weights' own data type, and an optimizer that works inside the backward pass, which accelerate's wrappers of
optimizer and backward do not know. What is left to do on one device is small and is done here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from lottery_tickets._batches import BatchLoss, LossFunction, measure, samples_of, size_of, total
from lottery_tickets.errors import NonfiniteLossError, TrainingMemoryError
from lottery_tickets.training._memory_errors import is_out_of_memory

_log = logging.getLogger(__name__)

Nonfinite = Literal["stop", "skip"]
SchedulerFactory = Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler]


@dataclass
class Progress:
    """What has been trained so far, as numbers that add.

    Attributes:
        steps: Updates of the weights.
        skipped: Batches left out for a loss or gradient that was not finite.
        loss_sum: Sum of the losses of all units (tokens, labels, samples).
        units: How many.
    """

    steps: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    units: int = 0

    @property
    def mean_loss(self) -> float | None:
        """Loss per unit, None without any."""
        return self.loss_sum / self.units if self.units else None


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode; afterwards every submodule's own mode, and no gradients left behind."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        with torch.enable_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        for parameter in model.parameters():
            parameter.grad = None


class Trainer:
    """Updates of a model's weights, one a batch.

    The loss of a batch is the mean over its units (tokens, labels, samples), as transformers or torch would have it;
    it is never clamped.

    Args:
        model: Any module with parameters that require gradients.
        optimizer: What `make_optimizer` gives.
        scheduler: Of the learning rate, made from the optimizer; stepped after each update.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss.
        max_batch_size: Larger batches are split; the update is that of the whole batch, up to rounding and to what
            layers do that look at a batch as a whole, such as BatchNorm.
        nonfinite: "stop" raises at the first batch whose loss or gradient is not finite; "skip" leaves it out.
        max_skipped: Share of the batches that may be left out, one being allowed in any case.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        *,
        scheduler: SchedulerFactory | None = None,
        loss_fn: LossFunction | None = None,
        max_batch_size: int | None = None,
        nonfinite: Nonfinite = "stop",
        max_skipped: float = 0.01,
    ) -> None:
        self.progress = Progress()
        self.optimizer = optimizer
        self.scheduler = None if scheduler is None else scheduler(optimizer)
        self._model, self._loss_fn = model, loss_fn
        self._limit = max_batch_size
        self._nonfinite, self._max_skipped = nonfinite, max_skipped

    def step(self, batch: Any) -> float | None:
        """Train on one batch.

        Returns:
            Its mean loss before the update; None if it was left out.

        Raises:
            NonfiniteLossError: A loss or gradient that is not finite, if such batches are not left out or have become
                too many. Weights and buffers are those from before the step.
            TrainingMemoryError: Memory that does not suffice for a single sample, or ran out when weights had already
                moved.
            BatchError: A batch of an unknown form.
        """
        before = self._changing_buffers()
        try:
            part = self._whole_step(batch, before)
        except NonfiniteLossError as error:
            self._undo(before)
            self._skip(error)
            return None
        self.progress.steps += 1
        self.progress.loss_sum += part.loss_sum
        self.progress.units += part.units
        if self.scheduler is not None:
            self.scheduler.step()
        return part.mean

    def _whole_step(self, batch: Any, before: list[_Saved]) -> BatchLoss:
        """Loss of a batch and the update by it, in as many pieces as memory asks for."""
        size = size_of(batch)
        while True:
            rows = min(size, self._limit or size)
            try:
                return self._in_pieces(batch, size, rows)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if self.optimizer.moved:
                    raise TrainingMemoryError(
                        f"Step {self._number}: memory ran out in the backward pass, when some weights had been updated "
                        "already and others not; the model is not to be used. Begin again from its initial weights, "
                        f"or from run_dir, with max_batch_size below {rows} or gradient_checkpointing=True."
                    ) from error
                if rows == 1:
                    raise TrainingMemoryError(
                        f"Step {self._number}: memory does not suffice for a single sample ({error}). Shorten the "
                        "samples, or pass gradient_checkpointing=True."
                    ) from error
            # Out here the error is gone, and with it the frames that held the graph.
            self._undo(before)
            self._limit = math.ceil(rows / 2)
            _log.warning("step %d: memory ran out; going on with micro-batches of %d", self._number, self._limit)

    def _in_pieces(self, batch: Any, size: int, rows: int) -> BatchLoss:
        """The update of the whole batch from gradients of its pieces."""
        parts: list[BatchLoss] = []
        weight = 0  # what the pieces before the last are divided by: how many units the batch is likely to have
        for start in range(0, size, rows):
            stop = min(size, start + rows)
            piece = batch if rows == size else samples_of(batch, start, stop)
            part = measure(self._model, piece, loss_fn=self._loss_fn)
            parts.append(replace(part, rows=None, graph=None))
            units = sum(one.units for one in parts)
            if not math.isfinite(part.loss_sum) or (stop == size and not units):
                raise NonfiniteLossError(f"the loss is {part.mean}")
            if stop < size:
                weight = weight or units * size // stop
                self.optimizer.accumulate(part.graph, weight)
            else:
                self.optimizer.backward(part.graph, units)
        return total(parts)
