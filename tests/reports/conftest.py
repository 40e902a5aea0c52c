"""Runs to report on, with names that mean harm."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from lottery_tickets import Mask
from lottery_tickets._score_files import write_scores
from reporting import HOSTILE, MODULE
from test_cli import model, run, text  # noqa: F401  # fixtures among them

_SMALL = ("--context", 16, "--max-windows", 4)


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of `imp` over two seeds, judged and looked through; its first layer is called HOSTILE."""
    place = tmp_path_factory.mktemp("runs")
    (place / "hostile.py").write_text(MODULE, encoding="utf-8")
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(sys, "path", list(sys.path))
        patch.setattr(os, "fsync", lambda descriptor: None)
        torch.set_num_threads(1)
        quick = ("--rounds", 2, "--target", 0.75, "--epochs", 2, "--lr", 0.05, "--save-every", 1000, "--seeds", 2)
        _done("imp", "--model", "hostile:Net", "--data", "hostile:loaders", *quick, "-o", "pruned")
        _done("verdict", "pruned", "--controls", "dense,random_reinit,random_mask")
        _done("stability", "pruned", "--steps", "0,4", "--seeds", 2, "--points", 3)
        torch.set_num_threads(threads)
        patch.delitem(sys.modules, "hostile")
    return place / "pruned"


@pytest.fixture(scope="session")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ticket of many tensors, the first of which is called HOSTILE."""
    path = tmp_path_factory.mktemp("tickets") / "many.safetensors"
    generator = torch.Generator().manual_seed(0)
    names = [f"{HOSTILE}.weight", *(f"layers.{number}.weight" for number in range(1, 24))]
    density = {name: (place + 1) / 25 for place, name in enumerate(names)}
    mask = Mask.from_tensors({name: torch.rand(8, 4, generator=generator) < density[name] for name in names})
    mask.save(path, metadata={"criterion": HOSTILE})
    return path


@pytest.fixture(scope="session")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scores of two tensors."""
    path = tmp_path_factory.mktemp("scores") / "fisher.safetensors"
    found = {HOSTILE: torch.arange(6.0).reshape(2, 3), "none": torch.ones(0, 3)}
    write_scores(path, found, {"criterion": "fisher"})
    return path


@pytest.fixture(scope="module")
def overlapped(ticket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `overlap --json` says of that ticket and a random one."""
    place = tmp_path_factory.mktemp("overlap")
    Mask.random_like(Mask.load(ticket), 1).save(place / "random.safetensors")
    return _told(place / "overlap.json", "overlap", ticket, place / "random.safetensors")


@pytest.fixture(scope="module")
def evaluated(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What `evaluate --json` says of tickets of a tiny language model, one of them called HOSTILE."""
    place = tmp_path_factory.mktemp("evaluate")
    _done("mask", model, "-s", 0.3, "-s", 0.6, "-o", place)
    tickets = sorted(place.glob("*.safetensors"))
    path = _told(place / "evaluate.json", "evaluate", model, *tickets, "--text", text, *_SMALL)
    told = json.loads(path.read_text(encoding="utf-8"))
    told["tickets"][HOSTILE] = told["tickets"].pop(str(tickets[-1]))
    path.write_text(json.dumps(told), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def compared(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """What `compare --json` says of two criteria."""
    path = tmp_path_factory.mktemp("compare") / "compare.json"
    criteria = ("--criteria", "magnitude,wanda", "-s", 0.3, "-s", 0.6, "--samples", 4)
    return _told(path, "compare", model, "--text", text, *criteria, *_SMALL)


def _done(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def _told(path: Path, *arguments: object) -> Path:
    path.write_text(_done(*arguments, "--json"), encoding="utf-8")
    return path
