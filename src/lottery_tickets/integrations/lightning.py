"""Callbacks for Lightning's `Trainer`: draw an early-bird ticket while a model trains; rewind and train a ticket.

They are written for `pytorch_lightning`; `lightning.pytorch`, the same library under another name, takes them too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.detection import Criterion
from lottery_tickets.errors import MissingExtraError, ParameterSelectionError
from lottery_tickets.integrations._holding import HoldingCallback
from lottery_tickets.integrations._ranks import is_first
from lottery_tickets.integrations._watching import WatchingCallback
from lottery_tickets.masks import Patterns

try:
    from pytorch_lightning import Callback
except ImportError as error:
    raise MissingExtraError("pytorch-lightning", "lightning") from error

if TYPE_CHECKING:
    from pytorch_lightning import LightningModule, Trainer

__all__ = ["EarlyBirdCallback", "HoldMaskCallback"]


class EarlyBirdCallback(WatchingCallback, Callback):  # type: ignore[misc]
    """Draws the magnitude mask again and again during training; once it has settled it is the early-bird ticket.

    The first mask is drawn before training, then one after every `check_interval` epochs or `check_every_steps`
    optimizer steps, as `compute_early_bird_tickets` does. Each check gives the Trainer's loggers
    `early_bird/distance` (to the mask before), `early_bird/null_distance` (what the same movement gives by
    chance), `early_bird/moved_fraction` and `early_bird/settled`.

    Where it settles the ticket is saved as `ticket.safetensors` in `folder`, and training stops unless `stop` is
    False. The state is part of Lightning's checkpoints; a run that had stopped and goes on stops at once.

    With several processes the first draws the masks, and has `ticket` and `results`. Of a model that
    `ModelParallelStrategy` shards each process counts its own part, and all have both.

    Args:
        target_sparsity: Fraction of the prunable weights to remove, in (0, 1).
        check_interval: Epochs between checks.
        check_every_steps: Optimizer steps between checks, in place of epochs.
        criterion: "window", "queue" or "rank_correlation"; see `EarlyBirdDetector`.
        convergence_threshold: Of the criterion; None for its own.
        stability_window: Of the criterion; None for its own.
        stop: Whether to end training where the mask has settled.
        module: Name of the submodule whose mask is drawn, in whose names it is; "" for the LightningModule itself.
        include: Widens what is prunable; see `prunable_parameters`.
        exclude: Narrows it.
        seed: Of the sample on which movement is measured.
        folder: For the ticket; None for `early-bird` in the Trainer's `default_root_dir`.

    Attributes:
        settled: Whether the mask has.
        ticket: The mask that has settled, else that of the last check; None before the first.
        results: An `EarlyBirdResults`.

    Raises:
        TrainingError: An argument out of range, or (when training begins) a model that FSDP1 or DeepSpeed ZeRO-3
            shards, or a sharded one whose magnitudes `rank_correlation` should rank.
        SparsityError: A sparsity outside (0, 1).
        ParameterSelectionError: No such submodule.

    Example:
        >>> import torch
        >>> from pytorch_lightning import LightningModule, Trainer
        >>> from lottery_tickets.integrations.lightning import EarlyBirdCallback
        >>> class Fit(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(4, 2)
        ...     def training_step(self, batch):
        ...         return self.net(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> bird = EarlyBirdCallback(check_every_steps=2, module="net")
        >>> quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...              enable_model_summary=False)
        >>> trainer = Trainer(max_steps=4, callbacks=[bird], **quiet)
        >>> trainer.fit(Fit(), torch.utils.data.DataLoader(torch.randn(8, 4), batch_size=2))
        >>> bird.ticket.names, [check["step"] for check in bird.results["checkpoints"]]
        (('weight',), [0, 2, 4])

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
        module: str = "",
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
        self._module, self._place = module, folder
        self._loaded: dict[str, Any] | None = None

    @property
    def state_key(self) -> str:
        """Names its state in a checkpoint, apart from that of a callback for another sparsity or submodule."""
        key: str = self._generate_state_key(sparsity=self._settings.sparsities[0], module=self._module)
        return key

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps; tensors are not copied."""
        if self._watch is None or not self._watch.looks:
            return {}
        values, tensors = self._state()
        return {"values": values, "tensors": tensors, "lines": self._lines()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what a checkpoint had, until training begins."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the first mask, or go on from the checkpoint's state."""
        loaded, self._loaded = self._loaded, None
        self._begin(submodule(pl_module, self._module))
        self._go_on(lambda: (loaded["values"], loaded["tensors"], loaded["lines"]) if loaded else None)
        # The checkpoint of an epoch's last step is written before the epoch ends, and goes on after its end.
        if self._due(epoch=_epochs_behind(trainer), step=trainer.global_step):
            self._look(trainer, pl_module)
        if self._settled and self._stop:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Look, if it is time by steps."""
        if self._due(epoch=None, step=trainer.global_step):
            self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look, if it is time by epochs."""
        if self._due(epoch=trainer.current_epoch + 1, step=trainer.global_step):
            self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        behind = _epochs_behind(trainer)
        epoch = trainer.current_epoch + 1 if behind is None else behind
        figures = self._check(submodule(pl_module, self._module), epoch=epoch, step=trainer.global_step)
        for logger in trainer.loggers if is_first() else ():
            logger.log_metrics(figures, step=trainer.global_step)
        if not self._settled:
            return
        ranks = Ranks.world()
        with ranks.together():
            if ranks.first:
                place = Path(trainer.default_root_dir) / "early-bird" if self._place is None else Path(self._place)
                self._save_ticket(place, {})
        if self._stop:
            trainer.should_stop = True


class HoldMaskCallback(HoldingCallback, Callback):  # type: ignore[misc]
    """Rewinds a ticket and trains it: pruned weights are zero from the first step to the last.

    It is the block of `held`, from the beginning of training to its end; accumulated gradients, mixed precision,
    `torch.compile`, DDP and FSDP2 need nothing. With `rewind_to` training begins at those weights, biases and
    buffers, bit for bit, and not where an earlier one had ended. (Lightning's own `ModelPruning` leaves biases,
    buffers and the optimizer's averages as trained. What it writes weights back from becomes the memory that is
    trained, so that from the second time on, on the device where the model was made, it does not rewind at all.)

    Args:
        mask: A `Mask` or a plain dict of tensors.
        rewind_to: Weights to begin from, such as the module's `state_dict()` before an earlier training, by the
            names of `module`: they are written into it at step 0, the pruned ones as zeros. Training that goes on
            from a checkpoint is not rewound.
        module: Name of the submodule in whose names the mask is; "" for the LightningModule itself.

    Attributes:
        mask: The ticket.

    Raises:
        MaskMismatchError: (When training begins) a mask that does not fit the model, or another than the
            checkpoint was made with.
        StateMismatchError: `rewind_to` lacks tensors of the mask, or does not fit the model.
        MaskAppliedError: A mask is applied to the model or held in it already.
        ParameterSelectionError: No such submodule.
        TrainingError: A model that FSDP1 or DeepSpeed ZeRO-3 shards.

    Example:
        >>> import torch
        >>> from pytorch_lightning import LightningModule, Trainer
        >>> from lottery_tickets.integrations.lightning import HoldMaskCallback
        >>> class Fit(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = torch.nn.Linear(2, 1)
        ...     def training_step(self, batch):
        ...         return self.net(batch).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> model, mask = Fit(), {"weight": torch.tensor([[True, False]])}
        >>> quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        ...              enable_model_summary=False)
        >>> hold = HoldMaskCallback(mask, module="net")
        >>> trainer = Trainer(max_steps=4, callbacks=[hold], **quiet)
        >>> trainer.fit(model, torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2))
        >>> model.net.weight[0, 1].item()
        0.0

    References:
        Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019, section 1: training f(x; m * theta), from
        the initial weights.
    """

    def __init__(
        self,
        mask: Mapping[str, torch.Tensor],
        *,
        rewind_to: Mapping[str, torch.Tensor] | None = None,
        module: str = "",
    ) -> None:
        super().__init__(mask, rewind_to=rewind_to)
        self._module = module

    @property
    def state_key(self) -> str:
        """Names its state in a checkpoint, apart from that of a callback for another submodule."""
        key: str = self._generate_state_key(module=self._module)
        return key

    def state_dict(self) -> dict[str, Any]:
        """Which ticket was held."""
        return {"digest": self._mask.digest()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another ticket."""
        self._check_digest(state_dict["digest"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Rewind, unless training goes on, and begin to hold."""
        self._hold(submodule(pl_module, self._module), rewind=trainer.global_step == 0)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go; the zeros stay."""
        self.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let go."""
        self.close()


def _epochs_behind(trainer: Trainer) -> int | None:
    """Whole epochs of optimizer steps; None inside one, or where an epoch has no length."""
    if trainer.num_training_batches == float("inf"):
        return None
    steps = -(-int(trainer.num_training_batches) // trainer.accumulate_grad_batches)
    return None if not steps or trainer.global_step % steps else trainer.global_step // steps


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by its name; the model itself by "".

    Raises:
        ParameterSelectionError: There is none.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ParameterSelectionError(f"module={name!r}: {type(model).__name__} has no such submodule.") from error
