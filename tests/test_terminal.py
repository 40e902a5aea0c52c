"""The command in a real terminal: bars, Ctrl-C and what it says, completion."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import lottery_tickets
from test_cli import run
from test_cli_imp import one_thread  # noqa: F401  # a fixture

pexpect = pytest.importorskip("pexpect")

# Slow as long as the file `slow` is there.
MODULE = """
import time
from pathlib import Path
import torch
from torch import nn

def make(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

class Batches:
    def __init__(self):
        self.inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(0))
        self.labels = self.inputs[:, :3].argmax(1)

    def __len__(self):
        return 6

    def __iter__(self):
        for start in range(0, 48, 8):
            if Path("slow").exists():
                time.sleep(0.2)
            yield self.inputs[start : start + 8], self.labels[start : start + 8]

def loaders():
    batches = Batches()
    return batches, [(batches.inputs, batches.labels)]
"""

ARGUMENTS = (
    *("imp", "--model", "slowly:make", "--data", "slowly:loaders"),
    *("--rounds", "3", "--target", "0.75", "--epochs", "5", "--lr", "0.05"),
)
PROGRAM = "import sys; sys.argv[0] = 'lottery-tickets'; from lottery_tickets.cli import main; main()"
BAR = r"\d+%\|.*?\| *\d+/\d+ \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(?:it/s|s/it)"

Terminal = Callable[..., Any]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of one's own, and the command on the path."""
    (tmp_path / "slowly.py").write_text(MODULE, encoding="utf-8")
    command = tmp_path / "bin" / "lottery-tickets"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{PROGRAM}" "$@"\n', encoding="utf-8")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.delitem(sys.modules, "slowly", raising=False)
    return tmp_path


@pytest.fixture
def environment(place: Path) -> Mapping[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
        "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(lottery_tickets.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "TERM": "xterm",
    }


def started(command: str, arguments: list[str], environment: Mapping[str, str]) -> Any:
    return pexpect.spawn(command, arguments, env=environment, encoding="utf-8", timeout=60, dimensions=(40, 200))


def test_ctrl_c_leaves_a_run_that_goes_on_as_it_says(place: Path, environment: Mapping[str, str]) -> None:
    (place / "slow").touch()
    terminal = started("lottery-tickets", [*ARGUMENTS, "-o", "run"], environment)
    terminal.expect(BAR)  # with a rate and the time that is left
    terminal.sendintr()
    terminal.expect("interrupted: run holds what was finished; to go on:")
    terminal.expect(r"  (lottery-tickets [^\r\n]+)")
    advice = terminal.match.group(1)
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert (terminal.exitstatus, terminal.signalstatus) == (130, None)
    assert not Path("run/results.json").exists()
    (place / "slow").unlink()

    program, *arguments = shlex.split(advice)
    again = started(program, [*arguments, "--quiet"], environment)
    again.expect(pexpect.EOF)
    again.close()
    assert again.exitstatus == 0
    assert not re.search(r"\d+%\|", again.before)
    assert "Iterative magnitude pruning of slowly:make" in again.before

    whole = run(*ARGUMENTS, "-o", "whole")
    assert whole.exit_code == 0, whole.output
    digests = [
        [one["mask_digest"] for one in json.loads(Path(name, "results.json").read_text())["runs"]["0"]["rounds"]]
        for name in ("run", "whole")
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == 4


@pytest.mark.slow
def test_ctrl_c_under_torchrun_says_how_all_processes_go_on(place: Path, environment: Mapping[str, str]) -> None:
    (place / "slow").touch()
    torchrun = Path(sys.executable).with_name("torchrun")
    options = ["--standalone", "--nproc-per-node", "2", "-m", "lottery_tickets"]
    environment = {**environment, "GLOO_SOCKET_IFNAME": "lo"}
    terminal = started(str(torchrun), [*options, *ARGUMENTS, "-o", "run"], environment)
    terminal.expect(BAR)
    terminal.sendintr()
    terminal.expect("interrupted: run holds what was finished; to go on:")
    terminal.expect(r"  ([^\r\n]+)")
    advice = terminal.match.group(1)
    terminal.expect(pexpect.EOF)
    terminal.close()
    (place / "slow").unlink()
    assert shlex.split(advice) == [str(torchrun), *options, "imp", "--config", "run/run.yaml"]

    program, *arguments = shlex.split(advice)
    again = started(program, [*arguments, "--quiet"], environment)
    again.expect(pexpect.EOF)
    again.close()
    assert again.exitstatus == 0
    assert again.before.count("Iterative magnitude pruning of slowly:make") == 1
    assert json.loads(Path("run/results.json").read_text())["seeds"] == [0]


# What a shell is started with, and what it reads the completion by.
SHELLS = {
    "bash": (["--norc", "--noprofile"], 'eval "$(_LOTTERY_TICKETS_COMPLETE=source_bash lottery-tickets)"'),
    "zsh": (
        ["--no-rcs"],
        'autoload -U compinit && compinit -u -D && eval "$(_LOTTERY_TICKETS_COMPLETE=source_zsh lottery-tickets)"',
    ),
}


def found_shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        problem = f"{name} is not installed; `make browser` does that on Debian, as root"
        if os.environ.get("CI"):
            pytest.fail(problem)
        pytest.skip(problem)
    return path


@pytest.mark.parametrize("name", SHELLS)
def test_the_shell_completes_commands_and_options(environment: Mapping[str, str], name: str) -> None:
    options, read = SHELLS[name]
    shell = started(found_shell(name), options, {**environment, "PS1": "ready> ", "TERM": "dumb"})
    shell.expect("ready> ")
    shell.sendline(f"{read}; echo loaded")
    shell.expect("\nloaded\r\n")
    shell.expect("ready> ")
    shell.send("lottery-tickets early\t")
    shell.expect("lottery-tickets early-bird ")
    shell.send("--check-e\t")
    shell.expect("--check-every-steps ")
    shell.close(force=True)


def test_fish_completes_commands_and_options(environment: Mapping[str, str]) -> None:
    script = """
        _LOTTERY_TICKETS_COMPLETE=source_fish lottery-tickets | source
        complete --do-complete "lottery-tickets early"
        complete --do-complete "lottery-tickets early-bird --check-e"
    """
    done = subprocess.run(
        [found_shell("fish"), "--no-config", "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    command, option = done.stdout.splitlines()
    assert command.startswith("early-bird\tTrain a model until")
    assert option.startswith("--check-every-steps\tOptimizer steps")
