"""Callbacks for transformers' `Trainer`: draw an early-bird ticket while a model trains; fine-tune a ticket."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.detection import Criterion
from lottery_tickets.errors import MissingExtraError
from lottery_tickets.integrations._folder import StateFolder
from lottery_tickets.integrations._holding import HoldingCallback
from lottery_tickets.integrations._ranks import Saved, is_first
from lottery_tickets.integrations._watching import TICKET, WatchingCallback
from lottery_tickets.masks import Mask, Patterns

try:
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy
except ImportError as error:
    raise MissingExtraError("transformers", "hf") from error

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = ["EarlyBirdCallback", "HoldMaskCallback"]

_log = logging.getLogger(__name__)


class EarlyBirdCallback(WatchingCallback, TrainerCallback):  # type: ignore[misc]
    """Draws the magnitude mask again and again during training; once it has settled it is the early-bird ticket.

    The first mask is drawn before training, then one after every `check_interval` epochs or `check_every_steps`
    optimizer steps, as `compute_early_bird_tickets` does. Each check logs `early_bird/distance` (to the mask
    before), `early_bird/null_distance` (what the same movement gives by chance), `early_bird/moved_fraction` and
    `early_bird/settled` by the Trainer's own `log`, so that whatever `report_to` names shows them.

    Where it settles the ticket is saved as `ticket.safetensors` in `folder`, training stops unless `stop` is
    False, and a checkpoint is saved if the Trainer saves any. Training that goes on from a checkpoint goes on with
    the checks, wherever it was killed; a run that had stopped stops again, after one step.

    Under DDP the first process draws the masks, and has `ticket` and `results`. Of a model that FSDP2 or tensor
    parallelism shards each process counts its own part, and all have both.

    Args:
        target_sparsity: Fraction of the prunable weights to remove, in (0, 1).
        check_interval: Epochs between checks.
        check_every_steps: Optimizer steps between checks, in place of epochs.
        criterion: "window", "queue" or "rank_correlation"; see `EarlyBirdDetector`.
        convergence_threshold: Of the criterion; None for its own.
        stability_window: Of the criterion; None for its own.
        stop: Whether to end training where the mask has settled.
        include: Widens what is prunable; see `prunable_parameters`.
        exclude: Narrows it.
        seed: Of the sample on which movement is measured.
        folder: For states and ticket; None for `early-bird` in the Trainer's `output_dir`.

    Attributes:
        settled: Whether the mask has.
        ticket: The mask that has settled, else that of the last check; None before the first.
        results: An `EarlyBirdResults`.

    Raises:
        TrainingError: An argument out of range, or (when training begins) a model that FSDP1 or DeepSpeed ZeRO-3
            shards, or a sharded one whose magnitudes `rank_correlation` should rank.
        SparsityError: A sparsity outside (0, 1).

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from lottery_tickets.integrations.transformers import EarlyBirdCallback
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(16, (8, 4))]
        >>> options = TrainingArguments("tuned", max_steps=4, save_strategy="no", report_to="none",
        ...                             disable_tqdm=True, use_cpu=True)
        >>> trainer = Trainer(LlamaForCausalLM(config), options, train_dataset=rows)
        >>> bird = EarlyBirdCallback(check_every_steps=2).add_to(trainer)
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> bird.ticket.sparsity, [check["step"] for check in bird.results["checkpoints"]]
        (0.5, [0, 2, 4])

    References:
        You et al., "Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks", ICLR 2020,
        arXiv 1909.11957, section 3.2 and algorithm 1.
    """

    def __init__(
        self,
        target_sparsity: float = 0.5,
        *,
        check_interval: int = 1,
        check_every_steps: int | None = None,
        criterion: Criterion = "window",
        convergence_threshold: float | None = None,
        stability_window: int | None = None,
        stop: bool = True,
        include: Patterns = None,
        exclude: Patterns = None,
        seed: int = 0,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(
            target_sparsity,
            check_interval=check_interval,
            check_every_steps=check_every_steps,
            criterion=criterion,
            convergence_threshold=convergence_threshold,
            stability_window=stability_window,
            include=include,
            exclude=exclude,
            seed=seed,
            stop=stop,
        )
        self._place = folder
        self._trainer: Trainer | None = None

    def add_to(self, trainer: Trainer) -> EarlyBirdCallback:
        """Join a Trainer's callbacks, and log by its `log`.

        A callback that is given in `callbacks=` instead is not told which Trainer it works for: its figures are in
        `state.log_history` and in `trainer_state.json`, but no tracker sees them.
        """
        self._trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Draw the first mask, or go on from the state that belongs to the checkpoint."""
        self._begin(model)
        self._folder = StateFolder(
            Path(args.output_dir) / "early-bird" if self._place is None else Path(self._place)
        )
        self._go_on(lambda: self._saved(state.global_step))
        if self._due(epoch=_whole(state.epoch), step=state.global_step):
            self._look(args, state, control, model)
        if self._settled and self._stop:
            control.should_training_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Look, if it is time by steps."""
        if self._due(epoch=None, step=state.global_step):
            self._look(args, state, control, model)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Look, if it is time by epochs."""
        if self._due(epoch=_whole(state.epoch), step=state.global_step):
            self._look(args, state, control, model)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Remove the states that no checkpoint needs."""
        if is_first():
            names = [path.name for path in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
            steps = [name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for name in names]
            self._folder.keep_for(int(step) for step in steps if step.isdecimal())

    # ---------------------------------------------------------------- a check

    def _saved(self, step: int) -> Saved | None:
        """The state that belongs to the checkpoint of a step."""
        found = self._folder.read(step) if step else None
        if found is None:
            self._folder.clear(TICKET)
        if found is None and step:
            _log.warning(
                "%s holds no check up to step %d, from which training goes on: the checks begin anew. Give the "
                "folder of the run before, if it has moved.",
                self._folder.path,
                step,
            )
        return found

    def _look(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module
    ) -> None:
        figures = self._check(model, epoch=math.ceil(state.epoch or 0), step=state.global_step)
        ranks = Ranks.world()
        with ranks.together():
            if ranks.first:
                self._folder.write(state.global_step, self._lines()[-1], *self._state())
                if self._settled:
                    self._save_ticket(self._folder.path, _origin(model))
        if ranks.first:
            self._tell(figures, state, control)
        if self._settled:
            control.should_save = control.should_save or args.save_strategy != SaveStrategy.NO
            control.should_training_stop = control.should_training_stop or self._stop

    def _tell(self, figures: dict[str, float], state: TrainerState, control: TrainerControl) -> None:
        """Log as the Trainer logs."""
        if self._trainer is None:
            state.log_history.append({**figures, "epoch": state.epoch, "step": state.global_step})
            return
        should_log = (
            control.should_log
        )  # which logging sets to False, though the Trainer's own figures are to come
        self._trainer.log(figures)
        control.should_log = should_log


class HoldMaskCallback(HoldingCallback, TrainerCallback):  # type: ignore[misc]
    """Fine-tunes a ticket: pruned weights are zero from the first step to the last, whatever the optimizer.

    It is the block of `held`, from the beginning of training to its end: gradient accumulation, `torch_compile`,
    mixed precision, DDP and FSDP2 need nothing. With adapters of PEFT the weights beneath them are held; a merge
    fills their zeros, see `compute_filled_zeros`.

    The ticket lies in `folder` beside the checkpoints; training that goes on from one of them must hold the same.

    Args:
        mask: A `Mask` or a plain dict of tensors, by the names of the model without adapters.
        rewind_to: Weights to begin from, such as the model's `state_dict()` before an earlier training: they are
            written into the model at step 0, the pruned ones as zeros. Training that goes on is not rewound.
        folder: For the ticket; None for `held` in the Trainer's `output_dir`.

    Attributes:
        mask: The ticket.

    Raises:
        MaskMismatchError: (When training begins) a mask that does not fit the model, or another than the run that
            goes on has held.
        StateMismatchError: `rewind_to` lacks tensors of the mask, or does not fit the model.
        MaskAppliedError: A mask is applied to the model or held in it already.
        TrainingError: A model that FSDP1 or DeepSpeed ZeRO-3 shards.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
        >>> from lottery_tickets import create_magnitude_mask, validate_pruning_correctness
        >>> from lottery_tickets.integrations.transformers import HoldMaskCallback
        >>> config = LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> model = LlamaForCausalLM(config)
        >>> mask = create_magnitude_mask(model, 0.5)
        >>> rows = [{"input_ids": row, "labels": row} for row in torch.randint(16, (8, 4))]
        >>> options = TrainingArguments("ticket", max_steps=2, save_strategy="no", report_to="none",
        ...                             disable_tqdm=True, use_cpu=True)
        >>> trainer = Trainer(model, options, train_dataset=rows, callbacks=[HoldMaskCallback(mask)])
        >>> _ = trainer.train()  # doctest: +ELLIPSIS
        {...}
        >>> validate_pruning_correctness(model, mask)["valid"]
        True

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 1: training f(x; m * theta), from
        the initial weights.
    """

    def __init__(
        self,
        mask: Mapping[str, torch.Tensor],
        *,
        rewind_to: Mapping[str, torch.Tensor] | None = None,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(mask, rewind_to=rewind_to)
        self._place = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Rewind, unless training goes on, and begin to hold."""
        path = (Path(args.output_dir) / "held" if self._place is None else Path(self._place)) / TICKET
        if state.global_step and path.exists():
            self._check_digest(Mask.load(path).digest())
        self._hold(model, rewind=state.global_step == 0)
        if is_first():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._mask.save(path)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let go; the zeros stay."""
        self.close()


def _whole(epoch: float | None) -> int | None:
    """The number of epochs, if the last of them is complete."""
    return int(epoch) if epoch is not None and epoch == int(epoch) else None


def _origin(model: nn.Module) -> dict[str, str]:
    """What the model is called, without the path to it."""
    name = getattr(model, "name_or_path", None)
    if not isinstance(name, str) or not name:
        return {}
    return {"base_model": Path(name).name if Path(name).exists() else name}
