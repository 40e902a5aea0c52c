"""Pages on memory say what the library says."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lottery_tickets.cli import app

ROOT = Path(__file__).parents[2]
CONSOLES = re.findall(
    r"```console\n\$ lottery-tickets (.*)\n((?:.*\n)*?)```", (ROOT / "docs/memory.md").read_text("utf-8")
)


def test_batch_sizes_are_those_of_the_plans():
    page = runpy.run_path(str(ROOT / "benchmarks" / "batch_sizes.py"))["page"]
    assert (ROOT / "docs" / "batch-sizes.md").read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(("command", "shown"), CONSOLES, ids=[command for command, _ in CONSOLES])
def test_what_a_command_prints(command, shown):
    printed = CliRunner().invoke(app, shlex.split(command)).stdout
    assert [line.rstrip() for line in printed.rstrip().splitlines()] == shown.rstrip().splitlines()


def test_there_are_commands():
    assert len(CONSOLES) >= 2
