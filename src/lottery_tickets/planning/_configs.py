"""Public architectures at their published shapes, shipped as data."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, TypedDict

_SUFFIXES = ("-config.json", ".json")


class ShippedConfig(TypedDict):
    """One of the files in `configs/`.

    Attributes:
        source: Where the shape was published.
        parameters: How many parameters the model has, tied ones counted once.
        config: What the shape hangs on, in transformers' words.
    """

    source: str
    parameters: int
    config: dict[str, Any]


def shipped_names() -> list[str]:
    """Names that `plan_memory` knows without a file."""
    return sorted(one.name.removesuffix(".json") for one in _folder().iterdir() if one.name.endswith(".json"))


def shipped_config(name: str) -> ShippedConfig | None:
    """The configuration of this name, which may end as a file's does; None if there is none."""
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    by_name = {known.lower(): known for known in shipped_names()}
    known = by_name.get(name.lower())
    if known is None:
        return None
    found: ShippedConfig = json.loads((_folder() / f"{known}.json").read_text(encoding="utf-8"))
    return found


def _folder() -> Any:
    return files("lottery_tickets.planning") / "configs"
