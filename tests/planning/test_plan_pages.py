"""Pages on memory say what the library says."""

from __future__ import annotations

import json
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


def test_plans_are_within_the_bar_of_measured_peaks_and_are_todays():
    results = json.loads((ROOT / "benchmarks/results/memory_plan.json").read_text(encoding="utf-8"))
    planned = runpy.run_path(str(ROOT / "benchmarks" / "memory_plan.py"))["planned"]
    assert len({row["model"] for row in results["rows"]}) == 3
    assert len({row["operation"] for row in results["rows"]}) == 5
    for row in results["rows"]:
        predicted = planned(row["model"], row["operation"])["total"]
        assert predicted == row["predicted_bytes"]
        assert predicted == pytest.approx(row["peak_bytes"], rel=results["bar"])
