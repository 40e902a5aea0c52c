"""docs/troubleshooting.md quotes messages as the library has them, and names every exception."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

from lottery_tickets import errors

ROOT = Path(__file__).parents[1]
ROWS = re.findall(
    r"(?m)^\| `(.+?)` \| `(\w+(?:Error|Warning))` \|",
    (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8"),
)


def told(node: ast.AST) -> str:
    """The text in an expression, in the order in which it is written; what is put in when it runs is left out."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(told(child) for child in ast.iter_child_nodes(node))


def all_messages() -> list[tuple[str, str]]:
    """What is called, and the text in its arguments, for every call in the library and what functions return."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
                found.append((name, told(node)))
            elif isinstance(node, ast.Return) and node.value is not None:
                found.append(("", told(node.value)))
    return found


MESSAGES = all_messages()
# Made by functions that say no class, or by the class itself.
ELSEWHERE = {"CheckpointError", "LayerCollapseWarning", "MissingExtraError"}


def holds(text: str, quoted: str) -> bool:
    """Whether the pieces of a quoted message stand in a text, in their order."""
    pieces = [re.escape(piece.strip()) for piece in quoted.split("...")]
    return re.search(".*".join(pieces), text, re.DOTALL) is not None


@pytest.mark.parametrize(("quoted", "name"), ROWS)
def test_a_message_is_one_of_the_library(quoted, name):
    raised = [text for called, text in MESSAGES if called == name]
    others = [text for _, text in MESSAGES] if name in ELSEWHERE else []
    assert any(holds(text, quoted) for text in [*raised, *others])


def test_every_exception_is_named():
    names = {name for name, _ in inspect.getmembers(errors, inspect.isclass)}
    assert names - {"LotteryTicketError"} <= {name for _, name in ROWS}
