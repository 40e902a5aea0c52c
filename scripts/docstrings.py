"""How mkdocstrings reads our docstrings: "Example:" holds code, and public names in backticks are links."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import griffe

REFERENCE = Path(__file__).parents[1] / "docs" / "api"


def paths_of_names() -> dict[str, str]:
    """Where each name of the reference stands, those that stand there once."""
    paths = defaultdict(list)
    for page in REFERENCE.glob("*.md"):
        for path in re.findall(r"(?m)^::: (\S+)$", page.read_text(encoding="utf-8")):
            paths[path.rpartition(".")[2]].append(path)
    return {name: found[0] for name, found in paths.items() if len(found) == 1}


class Docstrings(griffe.Extension):
    """Changes the text of every docstring before it is parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.paths = paths_of_names()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute that it has read."""
        if obj.docstring is None:
            return
        text = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
        obj.docstring.value = re.sub(r"`(\w+)`", lambda found: self.linked(found[1], obj.name), text)

    def linked(self, name: str, here: str) -> str:
        """The name in backticks, a link where it leads to another entry."""
        path = self.paths.get(name)
        return f"`{name}`" if path is None or name == here else f"[`{name}`][{path}]"
