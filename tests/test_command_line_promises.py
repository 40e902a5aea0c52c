"""Commands, their options and what `--json` prints are promised: a change that is not meant shows here."""

from __future__ import annotations

import difflib
import runpy
from pathlib import Path
from typing import Any

import pytest

from lottery_tickets.cli._schemas import SCHEMAS

SCRIPT = Path(__file__).parents[1] / "scripts" / "frozen.py"


@pytest.fixture(scope="module")
def frozen() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def difference(path: Path, now: str) -> str:
    """Lines that went and came, and what to do if that is meant."""
    before = path.read_text(encoding="utf-8")
    lines = difflib.unified_diff(before.splitlines(), now.splitlines(), "promised", "now", lineterm="", n=0)
    return (
        "\n".join([f"If this is meant, `make frozen` writes {path.name} anew:", *lines]) if before != now else ""
    )


def test_commands_and_options_are_those_promised(frozen: dict[str, Any]) -> None:
    changed = difference(frozen["COMMANDS"], frozen["commands"]())
    assert not changed, changed


def test_json_is_what_was_promised(frozen: dict[str, Any]) -> None:
    changed = difference(frozen["PAGE"], frozen["page"]())
    assert not changed, changed


def test_a_difference_is_shown(tmp_path: Path) -> None:
    promised = tmp_path / "commands.txt"
    promised.write_text("imp\n  --rounds (int; default 10)\n", encoding="utf-8")
    shown = difference(promised, "imp\n  --rounds (int; default 5)\n")
    assert "make frozen" in shown
    assert "-  --rounds (int; default 10)\n+  --rounds (int; default 5)" in shown


def test_every_command_has_a_schema(frozen: dict[str, Any]) -> None:
    known = [line for line in frozen["commands"]().splitlines() if line and not line.startswith(" ")]
    assert sorted(known) == sorted(SCHEMAS)
    promised = (
        "mask score evaluate overlap compare inspect apply unit-mask extract early-bird imp verdict stability "
        "plan report demo"
    )
    assert set(promised.split()) <= set(known)
