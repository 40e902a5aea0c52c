"""Callbacks in transformers' Trainer: birds that a loop written out would find, zeros that stay."""

from __future__ import annotations

import json
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from lottery_tickets import Mask, create_magnitude_mask, validate_pruning_correctness
from lottery_tickets.detection import detect_early_bird_convergence
from lottery_tickets.errors import (
    DetectionError,
    MaskAppliedError,
    MaskMismatchError,
    RunFolderError,
    SparsityError,
    StateMismatchError,
    TrainingError,
)
from lottery_tickets.integrations import compute_filled_zeros
from lottery_tickets.integrations.transformers import EarlyBirdCallback, HoldMaskCallback
from processes import run_python
from test_early_bird import mlp, one_thread  # noqa: F401
from trainers import Classifier, scalars, tuned, tuner


class Watched(TrainerCallback):
    """Sees what a tracker would, and every mask and violation after each optimizer step."""

    def __init__(self, sparsity: float = 0.5, held: Any = None) -> None:
        self.logged: list[dict[str, float]] = []
        self.masks: list[Mask] = []
        self._sparsity, self._held = sparsity, held

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logged.append({**logs, "step": state.global_step})

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.masks.append(create_magnitude_mask(model, self._sparsity))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.masks.append(create_magnitude_mask(model, self._sparsity))
        if self._held is not None:
            assert validate_pruning_correctness(model, self._held)["valid"]
            for name in self._held:
                assert not model.get_parameter(name).grad[~self._held[name]].any()


def violations(model: nn.Module, mask: Mask) -> list[str]:
    return validate_pruning_correctness(model, mask)["problems"]


# --- Early birds ---


@pytest.mark.parametrize("criterion", ["window", "queue"])
def test_the_bird_is_that_of_a_loop_written_out(tmp_path, criterion):
    model, watched = Classifier(), Watched()
    bird = EarlyBirdCallback(check_every_steps=1, criterion=criterion)
    trainer = tuned(model, tmp_path, watched, bird, max_steps=40, learning_rate=0.001)
    expected = detect_early_bird_convergence(watched.masks, criterion=criterion)
    results = bird.results
    assert expected["converged"]
    assert bird.settled
    assert results["converged"]
    assert results["convergence_step"] == expected["convergence_check"] == trainer.state.global_step < 40
    assert [tuple(check["distances"]) for check in results["checkpoints"]] == expected["distances"]
    assert results["reason"] == expected["reason"]
    assert bird.ticket == expected["final_mask"] == create_magnitude_mask(model, 0.5)
    ticket = Mask.load(tmp_path / "early-bird" / "ticket.safetensors")
    assert ticket == bird.ticket
    assert ticket.metadata == {
        "criterion": "magnitude",
        "target_sparsity": "0.5",
        "early_bird": criterion,
        "epoch": str(results["convergence_epoch"]),
        "step": str(results["convergence_step"]),
    }


def test_checks_by_epochs_and_none_after_it_has_settled(tmp_path):
    bird = EarlyBirdCallback(check_interval=2, stability_window=1, convergence_threshold=0.4, stop=False)
    watched = Watched()
    trainer = tuned(Classifier(), tmp_path, watched, bird, max_steps=24)
    assert trainer.state.global_step == 24
    assert [(check["epoch"], check["step"]) for check in bird.results["checkpoints"]] == [(0, 0), (2, 8)]
    assert bird.ticket == watched.masks[8]


def test_figures_go_where_the_trainers_own_go(tmp_path):
    watched = Watched()
    bird = EarlyBirdCallback(check_every_steps=2)
    trainer = tuned(Classifier(), tmp_path, watched, bird, max_steps=6, logging_steps=1)
    checks = bird.results["checkpoints"]
    for seen in (watched.logged, trainer.state.log_history):
        ours = [line for line in seen if "early_bird/settled" in line]
        assert [line["step"] for line in ours] == [0, 2, 4, 6]
        for line, check in zip(ours[1:], checks[1:], strict=True):
            assert line["early_bird/distance"] == check["distances"][-1]
            assert line["early_bird/null_distance"] == check["null_distance"]
            assert line["early_bird/moved_fraction"] == check["moved_fraction"]
        assert [line["step"] for line in seen if "loss" in line] == [1, 2, 3, 4, 5, 6]


def test_without_add_to_the_figures_are_in_the_history(tmp_path):
    bird, watched = EarlyBirdCallback(check_every_steps=2), Watched()
    trainer = tuner(Classifier(), tmp_path, watched, max_steps=4)
    trainer.add_callback(bird)  # as callbacks= does
    trainer.train()
    ours = [line for line in trainer.state.log_history if "early_bird/settled" in line]
    assert [(line["step"], line["epoch"]) for line in ours] == [(0, 0), (2, 0.5), (4, 1.0)]
    assert not any("early_bird/settled" in line for line in watched.logged)


def test_tensorboard_shows_the_distance(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    bird = EarlyBirdCallback(check_every_steps=1)
    tuned(Classifier(), tmp_path, bird, max_steps=3, report_to="tensorboard")
    drawn = scalars(tmp_path / "board")
    assert [step for step, _ in drawn["train/early_bird/settled"]] == [0, 1, 2, 3]
    distances = [check["distances"][-1] for check in bird.results["checkpoints"][1:]]
    assert drawn["train/early_bird/distance"] == [
        (step, pytest.approx(distance)) for step, distance in enumerate(distances, 1)
    ]


def test_a_settled_bird_is_saved_with_a_checkpoint_and_stops_a_second_call(tmp_path):
    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 100, "learning_rate": 0.001}
    bird = EarlyBirdCallback(check_every_steps=1)
    tuned(Classifier(), tmp_path, bird, **options)
    step = bird.results["convergence_step"]
    assert {path.name for path in tmp_path.iterdir()} == {"early-bird", f"checkpoint-{step}"}
    again = EarlyBirdCallback(check_every_steps=1)
    trainer = tuned(Classifier(mlp(1)), tmp_path, again, resume=True, **options)
    assert trainer.state.global_step == step + 1 < 20
    assert again.ticket == bird.ticket
    assert [one["step"] for one in again.results["checkpoints"]] == list(range(step + 1))


@pytest.mark.slow
def test_states_are_kept_for_the_checkpoints_there_are(tmp_path):
    options = {"max_steps": 12, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}
    bird = EarlyBirdCallback(0.9, check_every_steps=2, stop=False)
    tuned(Classifier(), tmp_path, bird, **options)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]
    folders = sorted(path.name for path in (tmp_path / "early-bird").glob("step-*"))
    assert folders == ["step-00000008", "step-00000012"]
    # Gone on with from the older one, it takes up the older state.
    trainer = tuner(Classifier(mlp(1)), tmp_path, again := EarlyBirdCallback(0.9, check_every_steps=2), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert [one["distances"] for one in again.results["checkpoints"]] == [
        one["distances"] for one in bird.results["checkpoints"]
    ]
    assert again.ticket == bird.ticket


@pytest.mark.slow
def test_an_epoch_end_whose_check_a_kill_has_cut_off_is_looked_at_when_training_goes_on(tmp_path):
    """The checkpoint of an epoch's last step is written before the epoch ends."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    bird = EarlyBirdCallback(0.9)
    tuned(Classifier(), tmp_path, bird, **options)
    folder = tmp_path / "early-bird"
    for step in ("step-00000004", "step-00000008"):
        for path in (folder / step).iterdir():
            path.unlink()
        (folder / step).rmdir()
    first = EarlyBirdCallback(0.9, folder=tmp_path / "other")
    tuned(Classifier(), tmp_path / "elsewhere", first, max_steps=1)
    (tmp_path / "other" / "step-00000000").rename(folder / "step-00000000")
    trainer = tuner(Classifier(mlp(1)), tmp_path, again := EarlyBirdCallback(0.9), **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [one["step"] for one in again.results["checkpoints"]] == [0, 4, 8]
    assert [one["distances"] for one in again.results["checkpoints"]] == [
        one["distances"] for one in bird.results["checkpoints"]
    ]


def test_a_folder_that_has_gone_begins_anew_and_says_so(tmp_path, caplog):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    tuned(Classifier(), tmp_path, **options)
    (tmp_path / "checkpoint-6").rename(tmp_path / "old")
    with caplog.at_level(logging.WARNING):
        tuned(Classifier(), tmp_path, bird := EarlyBirdCallback(0.9, check_every_steps=3), resume=True, **options)
    assert "holds no check up to step 3" in caplog.text
    assert [one["step"] for one in bird.results["checkpoints"]] == [3, 6]


@pytest.mark.slow
def test_two_birds_need_two_folders(tmp_path):
    pair = [EarlyBirdCallback(sparsity, check_every_steps=1) for sparsity in (0.5, 0.9)]
    with pytest.raises(RunFolderError, match="give each callback a folder of its own"):
        tuned(Classifier(), tmp_path, *pair, max_steps=1)
    pair = [
        EarlyBirdCallback(sparsity, check_every_steps=1, folder=tmp_path / str(sparsity))
        for sparsity in (0.5, 0.9)
    ]
    tuned(Classifier(), tmp_path, *pair, max_steps=1)
    assert [bird.ticket.sparsity for bird in pair] == [0.5, pytest.approx(0.9, abs=0.01)]


def test_settings_are_checked_at_once_and_states_of_others_refused(tmp_path):
    with pytest.raises(TrainingError, match="check_every_steps is a positive integer"):
        EarlyBirdCallback(check_every_steps=0)
    with pytest.raises(SparsityError, match="target_sparsity is one fraction"):
        EarlyBirdCallback([0.3, 0.5])
    with pytest.raises(DetectionError, match="has not looked at any mask"):
        _ = EarlyBirdCallback().results
    assert EarlyBirdCallback().ticket is None
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tuned(Classifier(), tmp_path, EarlyBirdCallback(0.5, check_every_steps=1), **options)
    with pytest.raises(DetectionError, match="settings"):
        tuned(Classifier(), tmp_path, EarlyBirdCallback(0.6, check_every_steps=1), resume=True, **options)


# --- Tickets held ---


def test_zeros_stay_with_accumulated_and_clipped_gradients_and_decay(tmp_path):
    model = Classifier()
    mask = create_magnitude_mask(model, 0.7)
    before = model.net[0].weight.detach().clone()
    hold, watched = HoldMaskCallback(mask), Watched(held=mask)
    options = {"gradient_accumulation_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.1}
    trainer = tuned(model, tmp_path, hold, watched, save_strategy="steps", save_steps=4, **options)
    assert len(watched.masks) == 9
    assert not violations(model, mask)
    assert not torch.equal(model.net[0].weight[mask["net.0.weight"]], before[mask["net.0.weight"]])
    assert not model._forward_pre_hooks, "let go"
    assert Mask.load(tmp_path / "held" / "ticket.safetensors") == mask
    assert validate_pruning_correctness(tmp_path / "checkpoint-8", mask)["valid"]
    assert trainer.state.global_step == 8


def test_a_ticket_is_rewound_bit_for_bit_and_only_at_the_beginning(tmp_path):
    model, first = Classifier(mlp(1)), Classifier(mlp(0))
    mask = create_magnitude_mask(first, 0.5)

    class Start(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.weights = getattr(self, "weights", {key: one.clone() for key, one in model.state_dict().items()})

    options = {"save_strategy": "steps", "save_steps": 2}
    hold = HoldMaskCallback(mask, rewind_to=first.state_dict())
    tuned(model, tmp_path, hold, start := Start(), max_steps=2, **options)
    for name, weight in first.state_dict().items():
        expected = torch.where(mask[name], weight, 0.0) if name in mask else weight
        assert torch.equal(start.weights[name], expected)
    tuned(Classifier(mlp(2)), tmp_path, hold, start := Start(), resume=True, max_steps=4, **options)
    assert all(torch.equal(start.weights[name], weight) for name, weight in model.state_dict().items())


def test_what_does_not_fit_is_refused(tmp_path):
    model = Classifier()
    mask = create_magnitude_mask(model, 0.5)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(StateMismatchError, match="lacks 1 tensors"):
        HoldMaskCallback(mask, rewind_to={"net.0.weight": model.net[0].weight})
    other = {**model.state_dict(), "elsewhere": torch.ones(2)}
    with pytest.raises(StateMismatchError, match=r"elsewhere \(2,\), the model has none"):
        tuned(model, tmp_path / "a", HoldMaskCallback(mask, rewind_to=other), **options)
    with pytest.raises(MaskMismatchError, match="no such parameter"):
        tuned(model, tmp_path / "a", HoldMaskCallback({"gone": torch.ones(3)}), **options)
    with pytest.raises(MaskAppliedError, match="already"):
        tuned(model, tmp_path / "a", HoldMaskCallback(mask), HoldMaskCallback(mask, folder=tmp_path), **options)
    tuned(model := Classifier(), tmp_path / "b", HoldMaskCallback(mask), **{**options, "max_steps": 1})
    with pytest.raises(MaskMismatchError, match="held the ticket"):
        tuned(model, tmp_path / "b", HoldMaskCallback(~mask), resume=True, **options)
    model.net[0].weight.ds_id = 1  # as DeepSpeed marks its partitions
    for callback in (HoldMaskCallback(mask), EarlyBirdCallback()):
        with pytest.raises(TrainingError, match=r"net\.0\.weight is a part that FSDP1 or DeepSpeed"):
            tuned(model, tmp_path / "c", callback, **options)


@pytest.mark.slow
def test_training_that_failed_lets_go_when_it_is_called_again(tmp_path):
    class Broken(TrainerCallback):
        broken = True

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if self.broken:
                raise KeyboardInterrupt

    model = Classifier()
    mask = create_magnitude_mask(model, 0.5)
    hold, broken = HoldMaskCallback(mask), Broken()
    trainer = tuner(model, tmp_path, hold, broken, max_steps=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(model._forward_pre_hooks) == 1
    broken.broken = False
    trainer.train()
    assert not violations(model, mask)
    assert not model._forward_pre_hooks
    with pytest.raises(KeyboardInterrupt):
        broken.broken = True
        trainer.train()
    hold.close()
    assert not model._forward_pre_hooks


@pytest.mark.slow
def test_a_compiled_model_is_held(tmp_path):
    model = Classifier()
    mask = create_magnitude_mask(model, 0.7)
    tuned(model, tmp_path, HoldMaskCallback(mask), Watched(held=mask), torch_compile=True, max_steps=4)
    assert not violations(model, mask)


def test_masks_have_the_names_beneath_torch_compile(tmp_path):
    model, bird = Classifier(), EarlyBirdCallback()
    mask = create_magnitude_mask(model, 0.7)
    hold, compiled = HoldMaskCallback(mask), torch.compile(model)
    hold._hold(compiled, rewind=False)
    assert not violations(model, mask)
    hold.close()
    bird._begin(compiled)
    bird._check(compiled, epoch=0, step=0)
    assert bird.ticket.names == mask.names


TWO_PROCESSES = """
import json, os, sys
rank, folder, port, tests = int(sys.argv[1]), *sys.argv[2:]
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo")
sys.path.insert(0, tests)
import torch
from pathlib import Path
from lottery_tickets import create_magnitude_mask, validate_pruning_correctness
from lottery_tickets.integrations.transformers import EarlyBirdCallback, HoldMaskCallback
from test_early_bird import mlp
from trainers import Classifier, tuned

model = Classifier(mlp(0))
mask = create_magnitude_mask(model, 0.3)
bird = EarlyBirdCallback(0.6, check_every_steps=1)
options = dict(per_device_train_batch_size=8, learning_rate=0.001, ddp_backend="gloo", max_steps=40)
trainer = tuned(model, Path(folder), HoldMaskCallback(mask), bird, **options)
assert trainer.args.world_size == 2
valid = validate_pruning_correctness(model, mask)["valid"]
weights = [one.view(torch.uint8).tolist() for one in model.state_dict().values()]
print(json.dumps([trainer.state.global_step, bird.settled, valid, bird.ticket is not None, weights]))
"""


@pytest.mark.slow
def test_two_processes_stop_together_with_the_same_weights(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here = Path(__file__).parents[1]
    with ThreadPoolExecutor(2) as pool:
        printed = pool.map(lambda rank: run_python(TWO_PROCESSES, rank, tmp_path, port, here), range(2))
        first, second = (json.loads(text.splitlines()[-1]) for text in printed)
    assert first[0] == second[0] < 40
    assert first[1:4] == [True, True, True]
    assert second[1:4] == [True, True, False], "the ticket is the first's"
    assert first[4] == second[4]


# --- Adapters ---


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def test_a_merge_fills_zeros_and_is_told_of_and_masked_again(tmp_path, caplog):
    from transformers import Trainer, TrainingArguments

    model = tiny_llama()
    mask = create_magnitude_mask(model, 0.5)
    wanted = {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["lm_head"]}
    adapted = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **wanted))
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8))]
    options = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=0.01, save_strategy="no", report_to="none", use_cpu=True
    )
    head = adapted.get_base_model().lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    Trainer(adapted, options, train_dataset=rows, callbacks=[HoldMaskCallback(mask)]).train()
    assert not compute_filled_zeros(adapted, mask), "beneath the adapters"
    kept = mask["lm_head.weight"]
    assert not head[~kept].any(), "the trained copy is held too"
    assert not torch.equal(head[kept], before[kept])
    dense = adapted.merge_and_unload()
    with caplog.at_level(logging.WARNING):
        filled = compute_filled_zeros(dense, mask, remask=True)
    assert set(filled) == {name for name in mask if "q_proj" in name or "up_proj" in name}
    assert all(count == int((~mask[name]).sum()) for name, count in filled.items())
    assert all(name in caplog.text for name in filled)
    assert not compute_filled_zeros(dense, mask)
    assert not violations(dense, mask)
    with pytest.raises(MaskMismatchError):
        compute_filled_zeros(dense, {"elsewhere": torch.ones(2)})


def test_a_merge_in_place_is_seen_beneath_the_adapters():
    model = tiny_llama()
    mask = create_magnitude_mask(model, 0.5)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    compute_filled_zeros(adapted, mask, remask=True)
    adapted.merge_adapter()
    assert set(compute_filled_zeros(adapted, mask)) == {name for name in mask if "v_proj" in name}


# --- Imports ---


def test_a_missing_library_is_named_with_its_extra():
    code = """
import sys
import lottery_tickets.integrations
assert not {"transformers", "pytorch_lightning", "peft"} & {*sys.modules}, "imported when used"
for package, module in {"transformers": "transformers", "pytorch_lightning": "lightning"}.items():
    sys.modules[package] = None
    try:
        __import__(f"lottery_tickets.integrations.{module}")
    except ImportError as error:
        print(type(error).__name__, error)
"""
    first, second = run_python(code).splitlines()
    for printed, extra in ((first, "hf"), (second, "lightning")):
        assert printed.startswith("MissingExtraError")
        assert f"pip install 'lottery-tickets[{extra}]'" in printed
