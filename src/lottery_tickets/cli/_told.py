"""What commands tell a machine: JSON with the name and version of its schema, and what it was made with."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1  # of all commands together; a field that goes or changes its meaning makes it the next one

_PACKAGES = ("lottery-tickets", "torch", "numpy", "safetensors", "transformers")


def told(command: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The results of a command as JSON's own types, under the name of their schema.

    Numbers that JSON cannot write (NaN, infinity) become null.
    """
    envelope = {"schema": f"lottery-tickets.{command}/{SCHEMA_VERSION}", "made_with": made_with()}
    found: dict[str, Any] = strict({**envelope, **data})
    return found


def json_text(value: Mapping[str, Any]) -> str:
    """As it is printed and written."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, command: str, data: Mapping[str, Any]) -> None:
    """The results of a command as a file, whole or not at all."""
    from lottery_tickets._atomic import replacing

    with replacing(path) as temporary:
        temporary.write_text(json_text(told(command, data)) + "\n", encoding="utf-8")


@cache
def made_with() -> dict[str, str]:
    """Python and the packages that numbers may hang on, to their versions."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # an extra that is not installed
            continue
    return found


def strict(value: Any) -> Any:
    """The value as JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
