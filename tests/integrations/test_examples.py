"""The scripts of examples/, at toy size."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lottery_tickets
from lottery_tickets import Mask, validate_pruning_correctness

EXAMPLES = Path(__file__).parents[2] / "examples"
TOY = ("--epochs", "2", "--samples", "240", "--output", "ticket")
RESULT = r"^ticket of sparsity 0\.50: test accuracy (0\.\d+), 0 pruned weights are not zero$"


def run_accelerate(folder: Path, *options: str) -> str:
    """What the script prints, in a process of its own: accelerate keeps what it was first set up with."""
    source = str(Path(lottery_tickets.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, EXAMPLES / "accelerate_loop.py", "--cpu", *TOY, *options],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_lightning(*options: str) -> None:
    runpy.run_path(str(EXAMPLES / "lightning_ticket.py"))["main"](["--accelerator", "cpu", *TOY, *options])


def test_accelerate(mnist, tmp_path):
    text = run_accelerate(tmp_path)
    assert re.findall(r"^epoch (\d): ", text, re.M) == ["0", "1", "2"]
    assert re.search(RESULT, text, re.M)
    ticket = Mask.load(tmp_path / "ticket" / "ticket.safetensors")
    assert ticket.sparsity == 0.5
    assert validate_pruning_correctness(tmp_path / "ticket", ticket)["valid"]


def test_lightning(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_lightning()
    text = capsys.readouterr().out
    assert "at the last check 2 of 5 last distances are below 0.1" in text
    assert re.search(RESULT, text, re.M)
    (checkpoint,) = (tmp_path / "ticket").glob("**/version_1/checkpoints/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert len(saved["callbacks"]["HoldMaskCallback{'module': 'net'}"]["digest"]) == 64


@pytest.mark.slow
def test_tickets_of_the_examples_settle_and_train(mnist, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    enough = ("--samples", "2000", "--epochs", "12")
    run_lightning(*enough)
    for text in (capsys.readouterr().out, run_accelerate(tmp_path, *enough)):
        assert "settled: 5 of 5 last distances are below 0.1" in text
        assert float(re.search(RESULT, text, re.M)[1]) > 0.85
