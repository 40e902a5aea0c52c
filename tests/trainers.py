"""Small networks in the hands of transformers' and of Lightning's Trainer."""

from __future__ import annotations

import inspect
import logging
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytorch_lightning
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tensorboardX.proto.event_pb2 import Event
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from lottery_tickets import create_magnitude_mask
from lottery_tickets.integrations import lightning, transformers
from lottery_tickets.training import digest_of
from test_early_bird import blobs, mlp
from test_early_bird import told as results_told

logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)  # which devices there are


class Classifier(nn.Module):
    """A network as transformers' Trainer takes it."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = mlp() if net is None else net
        self.passes = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.passes += 1
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class LitClassifier(pytorch_lightning.LightningModule):
    """The same as Lightning's takes it; without dropout, as Lightning's checkpoints hold no random state."""

    def __init__(self, net: nn.Module | None = None, optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW):
        super().__init__()
        self.net = mlp() if net is None else net
        self.net[2].p = 0.0
        self._optimizer = optimizer
        self.passes = 0

    def training_step(self, batch: Any) -> torch.Tensor:
        self.passes += 1
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer(self.parameters(), lr=0.01)


ROWS = [{"x": x, "labels": label} for x, label in blobs()]  # 4 steps an epoch


def tuned(model: nn.Module, folder: Path, *callbacks: Any, resume: bool = False, **options: Any) -> Trainer:
    """A Trainer that has trained; with `resume` from the newest checkpoint in the folder, if there is one."""
    trainer = tuner(model, folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder) if resume and folder.exists() else None)
    return trainer


def tuner(model: nn.Module, folder: Path, *callbacks: Any, rows: Any = ROWS, **options: Any) -> Trainer:
    """A Trainer that has not trained yet; early birds log by it."""
    options = {
        "max_steps": 8,
        "learning_rate": 0.01,
        "per_device_train_batch_size": 16,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    trainer = Trainer(model, TrainingArguments(str(folder), **options), train_dataset=rows)
    for callback in callbacks:
        if isinstance(callback, transformers.EarlyBirdCallback):
            callback.add_to(trainer)
        else:
            trainer.add_callback(callback)
    return trainer


def fitted(
    model: pytorch_lightning.LightningModule, folder: Path, *callbacks: Any, ckpt: Any = None, **options: Any
) -> pytorch_lightning.Trainer:
    """Lightning's Trainer that has trained."""
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(one, ModelCheckpoint) for one in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        **options,
    }
    trainer = pytorch_lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **options)
    # Lightning before 2.6 has no such argument, and takes any pickle.
    strictly = ckpt is not None and "weights_only" in inspect.signature(trainer.fit).parameters
    strict = {"weights_only": True} if strictly else {}
    trainer.fit(model, DataLoader(blobs(), batch_size=16), ckpt_path=ckpt, **strict)
    return trainer


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard would draw: tag to steps and values."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in folder.rglob("events.out.tfevents*"):
        content, start = path.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            start += length + 16
    return found


# --- Runs to be killed: both callbacks at once, a sparser ticket looked for within the one that is held ---


def tune_to_the_end(net: nn.Module | None = None, run_dir: str | None = None, steps: int = 11) -> Any:
    model, first = Classifier(net), Classifier(mlp(0))
    bird = transformers.EarlyBirdCallback(0.7, check_every_steps=1, stability_window=99, stop=False)
    hold = transformers.HoldMaskCallback(create_magnitude_mask(first, 0.3), rewind_to=first.state_dict())
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    with tempfile.TemporaryDirectory() as elsewhere:
        tuned(model, Path(run_dir or elsewhere), hold, bird, resume=True, **options)
    return model, bird.results


def fit_to_the_end(net: nn.Module | None = None, run_dir: str | None = None, epochs: int = 6) -> Any:
    model, first = LitClassifier(net), LitClassifier(mlp(0))
    bird = lightning.EarlyBirdCallback(0.7, stability_window=99, module="net")
    hold = lightning.HoldMaskCallback(
        create_magnitude_mask(first.net, 0.3), rewind_to=first.net.state_dict(), module="net"
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        folder = Path(run_dir or elsewhere)
        keep = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        newest = max(folder.glob("epoch=*.ckpt"), default=None)
        fitted(model, folder, hold, bird, keep, ckpt=newest, max_epochs=epochs)
    return model, bird.results


def told(ended: Any) -> Any:
    model, results = ended
    return {**results_told(results), "weights": digest_of(model.state_dict()), "passes": model.passes}
