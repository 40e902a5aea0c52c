"""Whether a command's JSON is what its schema says."""

from __future__ import annotations

from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from lottery_tickets.cli._schemas import SCHEMAS
from lottery_tickets.cli._told import SCHEMA_VERSION


def check_schema(command: str, found: dict[str, Any]) -> None:
    """Every field is there, no other is, and each is of its type."""
    own = dict(found)
    assert own.pop("schema") == f"lottery-tickets.{command}/{SCHEMA_VERSION}"
    assert {"python", "lottery-tickets", "torch"} <= own.pop("made_with").keys()
    problems = "\n".join(_problems(own, SCHEMAS[command], command))
    assert not problems, problems


def _problems(value: Any, kind: Any, where: str) -> Iterator[str]:
    if kind is Any or (value is None and kind is float):  # numbers that are not finite are null
        return
    if is_typeddict(kind):
        yield from _of_fields(value, get_type_hints(kind), where)
        return
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        if all(list(_problems(value, one, where)) for one in arguments):
            yield f"{where}: {value!r} is none of {kind}"
    elif origin is Literal:
        if value not in arguments:
            yield f"{where}: {value!r} is none of {arguments}"
    elif origin in (list, tuple) and isinstance(value, list):
        kinds = arguments if origin is tuple else arguments * len(value)
        for place, (one, its_kind) in enumerate(zip(value, kinds, strict=True)):
            yield from _problems(one, its_kind, f"{where}[{place}]")
    elif origin is dict and isinstance(value, dict):
        for name, one in value.items():
            yield from _problems(one, arguments[1], f"{where}.{name}")
    elif not _is_plain(value, kind):
        yield f"{where}: {value!r} is no {kind}"


def _of_fields(value: Any, hints: dict[str, Any], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no object"
        return
    for name in sorted(hints.keys() ^ value.keys()):
        yield f"{where}: {name} is {'missing' if name in hints else 'not in the schema'}"
    for name in hints.keys() & value.keys():
        yield from _problems(value[name], hints[name], f"{where}.{name}")


def _is_plain(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return kind in (str, bool, NoneType) and isinstance(value, kind)
