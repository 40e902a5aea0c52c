"""One optimizer step after another, each of them whole or not at all.

Hugging Face's accelerate would bring devices, mixed precision and process groups; here a process has one device,
the weights' own data type, and an optimizer that works inside the backward pass, which accelerate's wrappers of
optimizer and backward do not know, and torch's DistributedDataParallel neither. What is left to do is small and is
done here: the step of several ranks is that of all their batches together, on which they agree beforehand.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lottery_tickets._batches import BatchLoss, LossFunction, measure, samples_of, size_of, total
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import NonfiniteLossError, TrainingError, TrainingMemoryError
from lottery_tickets.training._joined import lies_in_parts
from lottery_tickets.training._memory_errors import is_out_of_memory
from lottery_tickets.training._optimizers import Stepper

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

    def add(self, part: BatchLoss) -> None:
        """Count a batch's loss."""
        self.loss_sum += part.loss_sum
        self.units += part.units

    @property
    def mean_loss(self) -> float | None:
        """Loss per unit, None without any."""
        return self.loss_sum / self.units if self.units else None


@contextmanager
def training(model: nn.Module) -> Iterator[None]:
    """Training mode; afterwards every submodule's own mode. Gradients are dropped, before and afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    _drop_gradients(model)
    try:
        model.train()
        with torch.enable_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        _drop_gradients(model)


class Trainer:
    """Updates of a model's weights, one a batch.

    The loss of a batch is the mean over its units (tokens, labels, samples), as transformers or torch would have
    it; it is never clamped.

    Args:
        model: Any module with parameters that require gradients.
        optimizer: What `make_optimizer` gives.
        scheduler: Of the learning rate, made from the optimizer; stepped after each update.
        loss_fn: `loss_fn(logits, targets)` in place of the model's usual loss.
        max_batch_size: Larger batches are split; the update is that of the whole batch, up to rounding and to what
            layers do that look at a batch as a whole, such as BatchNorm.
        nonfinite: "stop" raises at the first batch whose loss or gradient is not finite; "skip" leaves it out.
        max_skipped: Share of the batches that may be left out, one being allowed in any case.
        announce: Called with the first batch before it is trained on.
        ranks: Processes with the same weights, each of which is given a batch of its own at every step; the update
            is that of all of them as one batch. None for this process alone.
        penalty: Added to the loss of each update, once, and to no loss that is told.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Stepper,
        *,
        scheduler: SchedulerFactory | None = None,
        loss_fn: LossFunction | None = None,
        max_batch_size: int | None = None,
        nonfinite: Nonfinite = "stop",
        max_skipped: float = 0.01,
        announce: Callable[[Any], None] | None = None,
        ranks: Ranks | None = None,
        penalty: Callable[[], torch.Tensor] | None = None,
    ) -> None:
        self.progress = Progress()
        self.optimizer = optimizer
        self.scheduler = _scheduled(scheduler, optimizer.optimizer)
        self._model, self._loss_fn = model, loss_fn
        self._limit = max_batch_size
        self._nonfinite, self._max_skipped = nonfinite, max_skipped
        self._updating = False
        self._announce, self._penalty = announce, penalty
        self._ranks = ranks or Ranks()
        self._sharded = lies_in_parts(model)
        self._latest: Any = None  # piece of a batch, where the model is in parts

    def step(self, batch: Any) -> BatchLoss | None:
        """Train on one batch.

        Returns:
            Its loss before the update, that of all ranks together; None if it was left out.

        Raises:
            NonfiniteLossError: A loss or gradient that is not finite, where such batches are not left out or have
                become too many. A loss leaves weights and buffers as they were before the step; a gradient leaves
                its own tensor so, and the message says if others had been updated before.
            TrainingMemoryError: Memory that does not suffice for a single sample, or ran out when weights had
                already moved.
            BatchError: A batch of an unknown form.
        """
        if self._announce is not None:
            self._announce(batch)
            self._announce = None
        before = self._changing_buffers()
        try:
            part = self._whole_step(batch, before)
        except _NotFiniteError as error:
            self.optimizer.zero_grad()
            if not (self._updating and self.optimizer.moved):
                _restore(before)
            self._skip(str(error))
            return None
        self.progress.steps += 1
        self.progress.add(part)
        if self.scheduler is not None:
            self.scheduler.step()
        return part

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on beside the model: numbers, text and tensors."""
        return {
            "progress": asdict(self.progress),
            "limit": self._limit,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state that `state` gave, which is copied."""
        self.progress = Progress(**state["progress"])
        self._limit = state["limit"]
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(deepcopy(state["scheduler"]))

    @property
    def _where(self) -> str:
        return f"Step {self.progress.steps + self.progress.skipped + 1}"

    def _whole_step(self, batch: Any, before: list[_Saved]) -> BatchLoss:
        """Loss of a batch and the update by it, in as many pieces as memory asks for."""
        size = size_of(batch)
        if self._sharded:
            with self._ranks.watched(self._where):
                return self._in_step(batch, size, before)
        while True:
            rows = max(1, min(size, self._limit or size))
            try:
                return self._in_pieces(batch, size, _bounds(size, rows), before)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._refuse_if_moved(error, rows)
                if rows == 1:
                    raise TrainingMemoryError(
                        f"{self._where}: memory does not suffice for a single sample ({error}). Shorten the "
                        "samples, or pass gradient_checkpointing=True."
                    ) from error
            # Out here the error is gone, and with it the frames that held the graph.
            gc.collect()
            self.optimizer.zero_grad()
            _restore(before)
            self._limit = math.ceil(rows / 2)
            _log.warning("%s: memory ran out; going on with micro-batches of %d", self._where, self._limit)

    def _in_step(self, batch: Any, size: int, before: list[_Saved]) -> BatchLoss:
        """The same where a pass through the model is one of all ranks: each makes as many, some of no samples."""
        rows = max(1, min(size, self._limit or size))
        pieces = max(1, *self._ranks.gather(math.ceil(size / rows)))
        bounds = [(size * turn // pieces, size * (turn + 1) // pieces) for turn in range(pieces)]
        try:
            return self._in_pieces(batch, size, bounds, before)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingMemoryError(
                f"{self._where}: memory ran out, and other ranks wait in the middle of a pass. Begin again with "
                f"max_batch_size below {rows} or gradient_checkpointing=True."
            ) from error

    def _in_pieces(
        self, batch: Any, size: int, bounds: Sequence[tuple[int, int]], before: list[_Saved]
    ) -> BatchLoss:
        """The update of the whole batch, that of all ranks, from gradients of its pieces."""
        self._updating = False
        own: _Own | None = None
        problem = None
        try:
            own = self._all_but_the_update(batch, size, bounds)
        except _NotFiniteError as error:
            problem = str(error)
        whole = self._agreed(None if own is None else own.part, problem)
        assert own is not None
        # Reducing gradients to their parts, FSDP takes the mean over ranks.
        units = whole.units / self._ranks.size if self._sharded else whole.units
        if own.divisor not in (0, units):
            self.optimizer.scale_accumulated(own.divisor / units)
        self._update(own.graph, units)
        self._share_buffers(before)
        return whole

    def _all_but_the_update(self, batch: Any, size: int, bounds: Sequence[tuple[int, int]]) -> _Own:
        """Losses of all pieces; gradients, held by the optimizer, of all but the last, whose graph is kept."""
        parts: list[BatchLoss] = []
        graph = problem = None
        divisor = 0  # of the pieces before the last: the units the batch will have if all have as many as these
        for turn, (start, stop) in enumerate(bounds, 1):
            piece = batch if len(bounds) == 1 else samples_of(batch, start, stop)
            graph, part = self._passed(piece, start == stop)
            if part.units and not math.isfinite(part.loss_sum):
                problem = problem or f"the loss is {part.mean}"
                if not self._sharded:  # else the others go on, and wait
                    break
            parts.append(part)
            if turn < len(bounds) and graph is not None:
                units = sum(one.units for one in parts)
                # Of a model in parts, gradients are of all ranks, and so is what they are divided by.
                divisor = 1 if self._sharded else divisor or math.ceil(units * size / stop)
                self.optimizer.accumulate(graph / divisor)
        if problem is not None:
            raise _NotFiniteError(problem)
        return _Own(total(parts), graph, divisor)

    def _passed(self, piece: Any, empty: bool) -> tuple[torch.Tensor | None, BatchLoss]:
        """A forward pass: the loss's sum with its graph, None where there is no way back, and its numbers."""
        if not self._sharded:
            part = measure(self._model, piece, loss_fn=self._loss_fn)
            return part.graph if part.units else None, total([part])
        if empty and self._latest is None:
            raise TrainingError(
                f"{self._where}: this rank's first batch holds no samples, and a model in parts is gone through "
                "by all ranks together. Give each rank a sample at least."
            )
        # Who has no samples goes with the others all the same, and adds nothing.
        part = measure(self._model, self._latest if empty else piece, loss_fn=self._loss_fn)
        if part.graph is None:
            raise TrainingError(
                f"{self._where}: of no labels the loss has no graph to go back from, as all ranks must. Give each "
                "rank labels in every batch."
            )
        if empty:
            return part.graph * 0, BatchLoss(0.0, 0, 0)
        self._latest = piece
        return part.graph, total([part])

    def _agreed(self, part: BatchLoss | None, problem: str | None) -> BatchLoss:
        """The batches of all ranks as one.

        Raises:
            _NotFiniteError: On all ranks, if one cannot go on, or none has a unit.
        """
        told = self._ranks.gather((part, problem))
        for rank, (_, other) in enumerate(told):
            if other is not None:
                raise _NotFiniteError(other + (f" on rank {rank}" if self._ranks.size > 1 else ""))
        whole = total([one for one, _ in told if one is not None and one.samples])
        if not whole.samples:
            raise _NotFiniteError("the batch holds no samples, so it has no loss")
        if not whole.units:
            raise _NotFiniteError("every label of the batch is ignored, so it has no loss")
        return whole

    def _share_buffers(self, before: list[_Saved]) -> None:
        """Let every rank have the running statistics of rank 0, as DistributedDataParallel does."""
        for module, name, _ in before if self._ranks.size > 1 else ():
            buffer = module._buffers[name]
            assert buffer is not None
            if not self._ranks.first:
                buffer.zero_()
            self._ranks.add_up(buffer)

    def _update(self, graph: torch.Tensor | None, units: float) -> None:
        self._updating = True
        # A last piece that has nothing to add still makes the update by the others.
        loss = self._nothing() if graph is None else graph / units
        if self._penalty is not None:
            loss = loss + self._penalty() / self._ranks.size  # gradients of all ranks are added up
        self.optimizer.backward(loss)
        if self.optimizer.nonfinite:
            moved = self.optimizer.moved
            others = f"; {moved} other tensors were updated before that was known" if moved else ""
            raise _NotFiniteError(f"the gradient of {', '.join(self.optimizer.nonfinite)} is not finite{others}")

    def _nothing(self) -> torch.Tensor:
        """A loss of zero with a graph."""
        trainable = [one for one in self._model.parameters() if one.requires_grad]
        return 0 * min(trainable, key=torch.numel).sum()

    def _refuse_if_moved(self, error: BaseException, rows: int) -> None:
        # Other ranks wait for the gradients of a backward pass that was agreed on.
        if self._updating and (self.optimizer.moved or self._ranks.size > 1):
            raise TrainingMemoryError(
                f"{self._where}: memory ran out in the backward pass, when some weights had been updated already "
                "and others not, so the model is not to be used. Begin again from its initial weights, or from "
                f"run_dir, with max_batch_size below {rows} or gradient_checkpointing=True."
            ) from error

    def _skip(self, what: str) -> None:
        """Leave the batch out, or raise."""
        where, progress = self._where, self.progress
        remedy = "Lower the learning rate or max_grad_norm, or look at the data"
        if self._nonfinite == "stop":
            raise NonfiniteLossError(f"{where}: {what}. {remedy}; nonfinite='skip' leaves out single batches.")
        progress.skipped += 1
        seen = progress.steps + progress.skipped
        if progress.skipped > max(1, self._max_skipped * seen):
            raise NonfiniteLossError(
                f"{where}: {what}. That makes {progress.skipped} of {seen} batches, more than "
                f"max_skipped={self._max_skipped}. {remedy}."
            )
        _log.warning("%s: %s; left out", where, what)

    def _changing_buffers(self) -> list[_Saved]:
        """Copies of what a forward pass may change: running means and the like, of modules in training mode."""
        return [
            _Saved(module, name, buffer.clone())
            for module in self._model.modules()
            if module.training
            for name, buffer in module._buffers.items()
            if buffer is not None
            and name not in module._non_persistent_buffers_set
            and (buffer.is_floating_point() or buffer.numel() == 1)
        ]


def _bounds(size: int, rows: int) -> list[tuple[int, int]]:
    """Where pieces of so many rows begin and end."""
    return [(start, min(size, start + rows)) for start in range(0, size, rows)]


def _drop_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


class _Own(NamedTuple):
    """A batch before its update.

    Attributes:
        part: Its losses.
        graph: Loss sum of its last piece; None where that has no units.
        divisor: What the gradients that are held were divided by; 0 if none are.
    """

    part: BatchLoss
    graph: torch.Tensor | None
    divisor: int


class _Saved(NamedTuple):
    module: nn.Module
    name: str
    value: torch.Tensor


def _restore(saved: list[_Saved]) -> None:
    for module, name, value in saved:
        buffer = module._buffers[name]
        assert buffer is not None
        buffer.copy_(value)


class _NotFiniteError(Exception):
    """Inside a step: there is nothing to update by."""


def _scheduled(
    scheduler: SchedulerFactory | None, optimizer: torch.optim.Optimizer
) -> torch.optim.lr_scheduler.LRScheduler | None:
    if scheduler is None:
        return None
    made = scheduler(optimizer)
    if not isinstance(made, torch.optim.lr_scheduler.LRScheduler):
        raise TrainingError(
            "scheduler is a function from the optimizer to one of torch's learning rate schedulers; it returned "
            f"{type(made).__name__}."
        )
    return made
