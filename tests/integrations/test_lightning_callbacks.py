"""Callbacks in Lightning's Trainer: birds that a loop written out would find, tickets rewound and held."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint, ModelPruning
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from lottery_tickets import Mask, create_magnitude_mask, validate_pruning_correctness
from lottery_tickets.detection import detect_early_bird_convergence
from lottery_tickets.errors import (
    MaskMismatchError,
    ParameterSelectionError,
    StateMismatchError,
    TrainingError,
)
from lottery_tickets.integrations.lightning import EarlyBirdCallback, HoldMaskCallback
from test_early_bird import mlp, one_thread  # noqa: F401
from trainers import LitClassifier, fitted, scalars


class Watched(Callback):
    """Every mask, and violations of a held one, after each optimizer step."""

    def __init__(self, held: Any = None) -> None:
        self.masks: list[Mask] = []
        self._held = held

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.masks.append(create_magnitude_mask(module.net, 0.5))

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step == len(self.masks):
            self.masks.append(create_magnitude_mask(module.net, 0.5))
            if self._held is not None:
                assert validate_pruning_correctness(module.net, self._held)["valid"]


class Slow(LitClassifier):
    """Settles after some steps."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.002)


# --- Early birds ---


@pytest.mark.parametrize("steps", [True, False])
def test_the_bird_is_that_of_a_loop_written_out(tmp_path, steps):
    model, watched = Slow(), Watched()
    when = {"check_every_steps": 1} if steps else {"check_interval": 1}
    bird = EarlyBirdCallback(module="net", **when)
    trainer = fitted(model, tmp_path, watched, bird, max_epochs=20)
    expected = detect_early_bird_convergence(watched.masks[:: 1 if steps else 4])
    results = bird.results
    assert expected["converged"]
    assert bird.settled
    assert results["convergence_step"] == trainer.global_step < 80
    assert trainer.global_step == expected["convergence_check"] * (1 if steps else 4)
    assert results["convergence_epoch"] == -(-trainer.global_step // 4)
    assert [tuple(check["distances"]) for check in results["checkpoints"]] == expected["distances"]
    assert bird.ticket == expected["final_mask"] == create_magnitude_mask(model.net, 0.5)
    ticket = Mask.load(tmp_path / "early-bird" / "ticket.safetensors")
    assert ticket == bird.ticket
    assert ticket.metadata["step"] == str(trainer.global_step)


def test_figures_go_to_the_loggers(tmp_path):
    bird = EarlyBirdCallback(check_interval=1, module="net")
    loggers = [TensorBoardLogger(tmp_path / "board", name=""), CSVLogger(tmp_path / "table", name="")]
    fitted(LitClassifier(), tmp_path, bird, logger=loggers, max_epochs=2)
    distances = [check["distances"][-1] for check in bird.results["checkpoints"][1:]]
    drawn = scalars(tmp_path / "board")
    assert [step for step, _ in drawn["early_bird/settled"]] == [0, 4, 8]
    assert drawn["early_bird/distance"] == [
        (step, pytest.approx(distance)) for step, distance in zip((4, 8), distances, strict=True)
    ]
    table = (tmp_path / "table" / "version_0" / "metrics.csv").read_text()
    assert "early_bird/null_distance" in table
    assert f"{distances[0]}" in table


def test_a_settled_run_stops_at_once_when_it_goes_on(tmp_path):
    bird = EarlyBirdCallback(check_interval=1, stability_window=1, convergence_threshold=0.4, module="net")
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    model = LitClassifier()
    trainer = fitted(model, tmp_path, bird, keep, max_epochs=6)
    assert trainer.global_step == 4
    again = EarlyBirdCallback(check_interval=1, stability_window=1, convergence_threshold=0.4, module="net")
    other = LitClassifier(mlp(1))
    trainer = fitted(other, tmp_path, again, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=6)
    assert trainer.global_step == 4
    assert again.ticket == bird.ticket
    assert again.results["checkpoints"] == bird.results["checkpoints"]
    assert torch.equal(other.net[0].weight, model.net[0].weight)
    # Unless it is to go on.
    again = EarlyBirdCallback(
        check_interval=1, stability_window=1, convergence_threshold=0.4, module="net", stop=False
    )
    trainer = fitted(LitClassifier(), tmp_path, again, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=6)
    assert trainer.global_step == 24
    assert again.ticket == bird.ticket


def test_an_epoch_end_that_a_kill_has_cut_off_is_looked_at_when_training_goes_on(tmp_path):
    """A checkpoint every so many steps may be that of an epoch's last step."""

    def bird() -> EarlyBirdCallback:
        return EarlyBirdCallback(stability_window=99, module="net")

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fitted(LitClassifier(), tmp_path, whole := bird(), keep, max_epochs=3)
    fitted(LitClassifier(mlp(1)), tmp_path, rest := bird(), ckpt=tmp_path / "step=4.ckpt", max_epochs=3)
    for one in (whole, rest):
        assert [(check["epoch"], check["step"]) for check in one.results["checkpoints"]] == [
            *((0, 0), (1, 4), (2, 8), (3, 12)),
        ]
    assert [check["distances"] for check in whole.results["checkpoints"]] == [
        check["distances"] for check in rest.results["checkpoints"]
    ]


def test_birds_of_two_sparsities_go_on_side_by_side(tmp_path):
    def pair() -> list[EarlyBirdCallback]:
        return [EarlyBirdCallback(one, check_every_steps=1, stability_window=99) for one in (0.3, 0.5)]

    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    whole, rest = pair(), pair()
    fitted(LitClassifier(), tmp_path, *whole, keep, max_epochs=2)
    fitted(LitClassifier(mlp(1)), tmp_path, *rest, ckpt=tmp_path / "epoch=0.ckpt", max_epochs=2)
    for one, other in zip(whole, rest, strict=True):
        assert [check["distances"] for check in one.results["checkpoints"]] == [
            check["distances"] for check in other.results["checkpoints"]
        ]
        assert one.ticket == other.ticket
        assert one.ticket.names == ("net.0.weight", "net.3.weight")


# --- Tickets held ---


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_zeros_stay(tmp_path, options):
    model = LitClassifier()
    mask = create_magnitude_mask(model.net, 0.7)
    hold, watched = HoldMaskCallback(mask, module="net"), Watched(mask)
    fitted(model, tmp_path, hold, watched, gradient_clip_val=0.1, **options)
    assert len(watched.masks) > 4
    assert validate_pruning_correctness(model.net, mask)["valid"]
    assert not model.net._forward_pre_hooks


class Start(Callback):
    """The network's tensors before the first step."""

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        if not hasattr(self, "weights"):
            self.weights = copy.deepcopy(module.net.state_dict())


def test_a_ticket_is_rewound_bit_for_bit_in_every_round(tmp_path):
    initial = copy.deepcopy(mlp(0).state_dict())
    model, mask = LitClassifier(mlp(0)), None
    for sparsity in (0.3, 0.6):
        callbacks = [] if mask is None else [HoldMaskCallback(mask, rewind_to=initial, module="net")]
        fitted(model, tmp_path, *callbacks)
        mask = create_magnitude_mask(model.net, sparsity)
        hold = HoldMaskCallback(mask, rewind_to=initial, module="net")
        fitted(copy.deepcopy(model), tmp_path, hold, start := Start())
        for name, weight in initial.items():
            expected = torch.where(mask[name], weight, 0.0) if name in mask else weight
            assert torch.equal(start.weights[name], expected), name


def test_lightnings_own_pruning_does_not_rewind(tmp_path):
    """Biases never, and weights the first time only."""
    initial = mlp(0).state_dict()
    model = LitClassifier(mlp(0))
    seen = {}

    class Look(Callback):
        def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
            seen[trainer.current_epoch] = copy.deepcopy(module.net.state_dict())

    layers = [(model.net[0], "weight"), (model.net[3], "weight")]
    prune = ModelPruning("l1_unstructured", layers, amount=0.3, use_lottery_ticket_hypothesis=True)
    fitted(model, tmp_path, prune, Look(), max_epochs=3)
    for layer in ("0", "3"):
        kept = seen[2][f"{layer}.weight_mask"].bool()
        assert not torch.equal(seen[1][f"{layer}.bias"], initial[f"{layer}.bias"])
        assert not torch.equal(seen[2][f"{layer}.weight_orig"][kept], initial[f"{layer}.weight"][kept])


def test_training_that_goes_on_is_not_rewound_and_holds_the_same_ticket(tmp_path):
    first = LitClassifier(mlp(0))
    initial = {name: one.clone() for name, one in first.state_dict().items()}
    mask = create_magnitude_mask(first, 0.5)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}")
    fitted(first, tmp_path, HoldMaskCallback(mask, rewind_to=initial), keep, max_epochs=1)
    second = LitClassifier(mlp(1))
    path = tmp_path / "epoch=0.ckpt"
    fitted(second, tmp_path, HoldMaskCallback(mask, rewind_to=initial), start := Start(), ckpt=path)
    assert torch.equal(start.weights["0.weight"], first.net[0].weight)
    assert validate_pruning_correctness(second, mask)["valid"]
    with pytest.raises(MaskMismatchError, match="held the ticket"):
        fitted(second, tmp_path, HoldMaskCallback(~mask), ckpt=path)


def test_what_does_not_fit_is_refused_and_errors_let_go(tmp_path):
    model = LitClassifier()
    mask = create_magnitude_mask(model.net, 0.5)
    for callback in (EarlyBirdCallback(module="nets"), HoldMaskCallback(mask, module="nets")):
        with pytest.raises(ParameterSelectionError, match="module='nets': LitClassifier has no such submodule"):
            fitted(model, tmp_path, callback)
    with pytest.raises(MaskMismatchError, match="no such parameter"):
        fitted(model, tmp_path, HoldMaskCallback(mask))
    with pytest.raises(StateMismatchError, match="the model has none"):
        fitted(model, tmp_path, HoldMaskCallback(mask, rewind_to=mlp(0, inputs=16).state_dict()))
    with pytest.raises(TrainingError, match="check_interval is a positive integer"):
        EarlyBirdCallback(check_interval=0)

    class Broken(Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fitted(model, tmp_path, HoldMaskCallback(mask, module="net"), Broken())
    assert not model.net._forward_pre_hooks
    assert not list(Path(tmp_path).glob("early-bird/*"))
