"""A language model is fine-tuned until its ticket has settled; a second run trains it, and `inspect` looks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from typer.testing import CliRunner

from lottery_tickets import Mask, create_magnitude_mask
from lottery_tickets.cli import app
from lottery_tickets.integrations.transformers import EarlyBirdCallback, HoldMaskCallback


def tune(model: nn.Module, rows: list[dict[str, Any]], folder: Path, **options: Any) -> Trainer:
    """A Trainer with the options that both runs share."""
    shared = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-4,
        "save_strategy": "steps",
        "save_steps": 1000,  # at the end, then
        "save_only_model": True,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
    }
    return Trainer(model, TrainingArguments(str(folder), **{**shared, **options}), train_dataset=rows)


def draw_and_hold(load: Any, rows: list[dict[str, Any]], folder: Path) -> None:
    # The first run draws the early bird, stops, and saves.
    model = load()
    trainer = tune(model, rows, folder / "first", max_steps=10)
    bird = EarlyBirdCallback(check_every_steps=1, stability_window=3).add_to(trainer)
    trainer.train()
    step = trainer.state.global_step
    distances = [
        line["early_bird/distance"] for line in trainer.state.log_history if "early_bird/distance" in line
    ]
    assert step == 3
    assert bird.settled
    assert all(0 < distance < 0.1 for distance in distances)
    assert all(check["moved_fraction"] > 0.5 for check in bird.results["checkpoints"][1:])
    path = folder / "first" / "early-bird" / "ticket.safetensors"
    ticket = Mask.load(path)
    saved = LlamaForCausalLM.from_pretrained(folder / "first" / f"checkpoint-{step}", dtype="auto")
    assert create_magnitude_mask(saved, 0.5) == ticket == bird.ticket
    del model, saved, trainer, bird
    # The second trains the ticket to the end.
    model = load()
    trainer = tune(model, rows, folder / "second", max_steps=4, gradient_accumulation_steps=2)
    trainer.add_callback(HoldMaskCallback(ticket))
    trainer.train()
    inspected = ["inspect", str(path), "--json", "--model"]
    result = CliRunner().invoke(app, [*inspected, str(folder / "second" / "checkpoint-4")])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"]["not_zero"] == 0
    dense = CliRunner().invoke(app, [*inspected, str(folder / "first" / f"checkpoint-{step}")])
    assert dense.exit_code == 1
    assert json.loads(dense.stdout)["model"]["not_zero"] > 0.99 * (ticket.numel - ticket.kept)


def test_a_tiny_model(tmp_path):
    def load() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
        return LlamaForCausalLM(config)

    rows = [{"input_ids": row, "labels": row} for row in torch.randint(32, (20, 8))]
    draw_and_hold(load, rows, tmp_path)


@pytest.mark.slow
def test_smollm2(load_smollm2, smollm2_tokenizer, english_text, tmp_path):
    ids = smollm2_tokenizer(english_text[:8000], return_tensors="pt").input_ids[0]
    rows = [{"input_ids": row, "labels": row} for row in ids[: 20 * 32].view(20, 32)]
    draw_and_hold(load_smollm2, rows, tmp_path)
