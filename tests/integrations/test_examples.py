"""The scripts of examples/, at toy size."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from lottery_tickets import Mask, validate_pruning_correctness, vision

EXAMPLES = Path(__file__).parents[2] / "examples"
RESULT = r"^ticket of sparsity 0\.50: test accuracy (\d\.\d+), 0 pruned weights are not zero$"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, and without what accelerate keeps of its first use in a process."""
    monkeypatch.chdir(tmp_path)
    states = AcceleratorState, GradientState
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in the place of MNIST."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(240, 1, 28, 28, generator=generator), torch.arange(240) % 10
    monkeypatch.setattr(vision, "mnist", lambda: vision.Images(inputs, labels, inputs[:50], labels[:50]))


def run(name: str, *options: str) -> None:
    runpy.run_path(str(EXAMPLES / name))["main"](["--output", "ticket", *options])


def test_accelerate(few_images: Any, capsys: Any) -> None:
    run("accelerate_loop.py", "--cpu", "--epochs", "2")
    text = capsys.readouterr().out
    assert re.findall(r"^epoch (\d): ", text, re.M) == ["0", "1", "2"]
    assert re.search(RESULT, text, re.M)
    ticket = Mask.load("ticket/ticket.safetensors")
    assert ticket.sparsity == 0.5
    assert validate_pruning_correctness("ticket", ticket)["valid"]


def test_lightning(few_images: Any, capsys: Any) -> None:
    run("lightning_ticket.py", "--accelerator", "cpu", "--epochs", "2")
    text = capsys.readouterr().out
    assert "at the last check 2 of 5 last distances are below 0.1" in text
    assert re.search(RESULT, text, re.M)
    (checkpoint,) = Path("ticket").glob("**/version_1/checkpoints/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert len(saved["callbacks"]["HoldMaskCallback{'module': 'net'}"]["digest"]) == 64


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [("accelerate_loop.py", "--cpu"), ("lightning_ticket.py", "--accelerator", "cpu")], ids=str
)
def test_tickets_of_the_examples_settle_and_train(mnist: Any, capsys: Any, script: tuple[str, ...]) -> None:
    run(*script, "--samples", "2000", "--epochs", "12")
    text = capsys.readouterr().out
    assert "settled: 5 of 5 last distances are below 0.1" in text
    assert float(re.search(RESULT, text, re.M)[1]) > 0.85
