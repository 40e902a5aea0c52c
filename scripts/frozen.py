"""Write down what the command line promises: `make frozen`, after a change that is meant.

tests/frozen/commands.txt has every command with its arguments, options, defaults and help;
docs/command-line-json.md what each prints with --json. Tests hold both against the commands themselves and show
the difference.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

import typer

from lottery_tickets._verdict._judging import Judgement
from lottery_tickets.cli import app
from lottery_tickets.cli._schemas import SCHEMAS
from lottery_tickets.cli._told import SCHEMA_VERSION
from lottery_tickets.large_models import PrunedCheckpoint
from lottery_tickets.overlap import TicketOverlap
from lottery_tickets.stability import Instability
from lottery_tickets.verdict import TicketVerdict

ROOT = Path(__file__).parents[1]
COMMANDS = ROOT / "tests" / "frozen" / "commands.txt"
PAGE = ROOT / "docs" / "command-line-json.md"

# A TypedDict does not know what it was made from.
_BASES: dict[Any, tuple[Any, ...]] = {
    SCHEMAS["apply"]: (PrunedCheckpoint,),
    SCHEMAS["overlap"]: (TicketOverlap,),
    SCHEMAS["verdict"]: (Judgement, TicketVerdict),
    SCHEMAS["stability"]: (Instability,),
}

_INTRODUCTION = f"""# JSON of the command line

`--json`, after any command, prints its results as one JSON object and nothing else to stdout. Commands with a
folder of their own (`early-bird`, `imp`, `verdict`, `stability`) write the same object to its `results.json`, and
`compare -o` to its file. This page is made from the types that the tests hold every command's output against.

| field | type | is |
| --- | --- | --- |
| `schema` | string | `lottery-tickets.COMMAND/{SCHEMA_VERSION}`: the command and the version of this page. |
| `made_with` | object of string | Python and packages, to their versions. |

and the fields of the command below. Fields may be added within a version; one that goes, or comes to mean
something else, makes it the next. Numbers that JSON cannot write (NaN, infinity) are null.
"""


def commands() -> str:
    """Every command, its arguments and options, what they default to and their help."""
    return "\n\n".join("\n".join(_command(name, one)) for name, one in _known().items()) + "\n"


def page() -> str:
    """What each command prints with --json."""
    parts = [_INTRODUCTION]
    nested: dict[str, Any] = {}
    for name, schema in SCHEMAS.items():
        parts += [f"## {name}\n", f"{_about(schema)}\n", _fields(schema, nested)]
    parts.append("## Types\n")
    done: set[str] = set()
    while waiting := sorted(nested.keys() - done):
        for name in waiting:
            done.add(name)
            parts += [f"### {name}\n", f"{_about(nested[name])}\n", _fields(nested[name], nested)]
    order = parts.index("## Types\n") + 1
    types = [parts[place : place + 3] for place in range(order, len(parts), 3)]
    return "\n".join([*parts[:order], *(part for three in sorted(types) for part in three)])


def _known() -> dict[str, Any]:
    return dict(typer.main.get_command(app).commands)


# ---------------------------------------------------------------- commands


def _command(name: str, command: Any) -> Iterator[str]:
    yield name
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield f"  {paragraph}"
    for one in command.params:
        yield f"  {_parameter(one)}"
    for example in (command.epilog or "").split("\n\n")[1:]:
        yield f"  $ {example}"


def _parameter(parameter: Any) -> str:
    """In one line."""
    option = parameter.param_type_name == "option"
    names = (
        ", ".join([*parameter.opts, *parameter.secondary_opts])
        if option
        else parameter.metavar or parameter.name.upper()
    )
    told = [_kind(parameter)]
    if parameter.required:
        told.append("required")
    if parameter.nargs == -1 or getattr(parameter, "multiple", False):
        told.append("repeatable")
    default = parameter.default
    if not (default is None or default is False or default == () or callable(default)):
        told.append(f"default {default.value if isinstance(default, Enum) else default}")
    return f"{names} ({'; '.join(told)}): {getattr(parameter, 'help', None) or ''}".rstrip()


def _kind(parameter: Any) -> str:
    if getattr(parameter, "is_flag", False):
        return "flag"
    kind = parameter.type_descriptor.annotation
    kind = next(iter(get_args(kind)), kind)  # of a list, what is in it
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(str(one.value) for one in kind)
    bounds = ((">=", parameter.min), ("<=", parameter.max))
    return " ".join([kind.__name__.lower(), *(f"{sign} {bound}" for sign, bound in bounds if bound is not None)])


# ---------------------------------------------------------------- JSON


def _about(schema: Any) -> str:
    return inspect.cleandoc(schema.__doc__ or "").split("\n\n")[0].replace("\n", " ")


def _fields(schema: Any, nested: dict[str, Any]) -> str:
    """A table; types met on the way go to `nested`."""
    meanings = _meanings(schema)
    rows = [
        f"| `{name}` | {_type(kind, nested)} | {meanings[name]} |" for name, kind in get_type_hints(schema).items()
    ]
    return "\n".join(["| field | type | is |", "| --- | --- | --- |", *rows, ""])


def _meanings(schema: Any) -> dict[str, str]:
    """What the docstrings say of each field, those of what it is made from included."""
    found: dict[str, str] = {}
    for one in (*_BASES.get(schema, ()), schema):
        _, _, listed = inspect.cleandoc(one.__doc__ or "").partition("Attributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*?)(?=^    \w+: |^\S|\Z)", listed, flags=re.M | re.S):
            found[name] = " ".join(text.split()).replace("None", "null").replace("|", "\\|")
    return found


def _type(kind: Any, nested: dict[str, Any]) -> str:
    plain = {
        str: "string",
        int: "integer",
        float: "number",
        bool: "true or false",
        NoneType: "null",
        Any: "anything",
    }
    if kind in plain:
        return plain[kind]
    if is_typeddict(kind):
        nested[kind.__name__] = kind
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(_type(one, nested) for one in arguments)
    if origin is Literal:
        return ", ".join(f'"{one}"' for one in arguments)
    if origin is list:
        return f"array of {_type(arguments[0], nested)}"
    if origin is tuple:
        return f"array of {len(arguments)} {_type(arguments[0], nested)}"
    if origin is dict:
        return f"object of {_type(arguments[1], nested)}"
    raise TypeError(f"{kind}: no type of JSON")


def main() -> None:
    """Write both."""
    for path, text in ((COMMANDS, commands()), (PAGE, page())):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
