"""Commands started by torchrun: one job, whose results one process prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import lottery_tickets
from lottery_tickets import Mask, compute_ticket_overlap
from lottery_tickets.cli._shell import Session
from test_cli import fail, run, succeed
from test_cli_imp import MODULE

IMP = [
    "imp",
    "--model",
    "mynet:seeded",
    "--data",
    "mynet:loaders",
    "--rounds",
    "2",
    "--epochs",
    "2",
    "--lr",
    "0.1",
]


@pytest.fixture(autouse=True)
def own_module(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)


def launched(ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """By torchrun, in the current folder."""
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        "-m",
        "lottery_tickets",
    ]
    source = str(Path(lottery_tickets.__file__).parents[1])
    return subprocess.run(
        [sys.executable, *launcher, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
    )


def called(rank: int, folder: Path, *arguments: str) -> tuple[int, str, str]:
    """As torchrun would, in a rank that is there already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("RANK", str(rank))
        patch.setenv("WORLD_SIZE", str(dist.get_world_size()))
        result = run(*arguments)
    return result.exit_code, result.stdout, result.stderr


def test_rank_0_prints_and_writes_for_all(ranks, tmp_path):
    (code, out, err), *others = ranks(2).run(called, tmp_path, *IMP, "-o", "run", "--json")
    assert code == 0, err
    assert others == [(0, "", "")]
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == json.loads(out)
    assert succeed(*IMP, "-o", "run") == json.loads(out), "a run of two processes is known to one"


def test_an_error_on_all_ranks_is_told_by_rank_0(ranks, tmp_path):
    (tmp_path / "run").write_text("no folder")
    (code, out, err), *others = ranks(2).run(called, tmp_path, *IMP, "-o", "run")
    assert (code, out) == (1, "")
    assert err.startswith("error: run: no folder can be made there")
    assert others == [(1, "", "")]


@pytest.mark.parametrize(
    ("started", "told"),
    [
        (["--n", "2", "a tool", *IMP], "--n 2 'a tool'"),
        (IMP, ""),
        (["something", "else"], None),
    ],
)
def test_how_the_processes_were_started_is_read_from_what_started_them(tmp_path, started, told):
    program = f"import sys; sys.argv = ['tool', *{IMP}]; from lottery_tickets.cli import _launched as it"
    (tmp_path / "launch.py").write_text(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {program!r} + '; print(it.launcher())'])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(lottery_tickets.__file__).parents[1])}
    command = [sys.executable, "launch.py", *started]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    words = None if told is None else f"{sys.executable} launch.py {told}".strip()
    assert done.stdout.strip() == str(words)


def test_where_nobody_can_tell_how_they_were_started_that_is_left_to_the_user(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["lottery-tickets", "imp", "--of", "nobody"])
    session = Session(quiet=False, command="imp")
    with session.run_in(tmp_path / "run"):
        assert "to go on, by what started these processes:\n  " in session.resume
        assert session.resume.endswith(f" imp --config {tmp_path / 'run' / 'run.yaml'}")


@pytest.mark.slow
def test_rounds_by_torchrun_are_those_of_one_process(tmp_path):
    done = launched(2, *IMP, "-o", "two", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # once
    assert json.loads((tmp_path / "two" / "results.json").read_text()) == told
    alone = succeed(*IMP, "-o", "one")
    for number in (1, 2):
        ticket = f"seed-0/masks/round-{number:02d}.safetensors"
        overlap = compute_ticket_overlap(
            Mask.load(tmp_path / "two" / ticket), Mask.load(tmp_path / "one" / ticket)
        )
        assert overlap["overall_overlap"] > 0.95
    for ours, expected in zip(told["rounds"], alone["rounds"], strict=True):
        for name, found in expected["numbers"].items():
            assert ours["numbers"][name]["mean"] == pytest.approx(found["mean"], rel=0.05), name
    assert succeed(*IMP, "-o", "two") == told, "a run of two processes is known to one"


def test_a_command_for_one_process_says_so(tmp_path, monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert "stability runs in one process; call it without torchrun" in fail("stability", "run")


@pytest.mark.slow
def test_an_error_is_told_once_and_ends_all_processes(tmp_path):
    succeed(*IMP, "-o", "run")
    done = launched(2, *IMP[:-1], "0.2", "-o", "run")
    assert done.returncode == 1
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "of another configuration" in lines[0]
    assert not done.stdout


@pytest.mark.slow
def test_an_early_bird_search_that_two_processes_began_four_go_on_with(tmp_path, mnist):
    search = ["early-bird", "lenet-300-100", "--data", "mnist", "-o", "run", "--epochs"]

    def results(ranks: int, *arguments: str) -> dict[str, Any]:
        done = launched(ranks, *search, *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["results"][0]

    first = results(2, "1")
    _prolong(tmp_path / "run" / "state")
    second = results(4, "2")
    assert second["checkpoints"][: len(first["checkpoints"])] == first["checkpoints"]
    assert len(second["checkpoints"]) == len(first["checkpoints"]) + 1


def _prolong(folder: Path) -> None:
    """Let a run of one epoch look like one of two that was stopped after the first."""
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"max_epochs": 1', '"max_epochs": 2'))
    (path,) = folder.glob("state-*/state.json")
    state = json.loads(path.read_text())
    state["values"]["reason"] = None
    path.write_text(json.dumps(state))
