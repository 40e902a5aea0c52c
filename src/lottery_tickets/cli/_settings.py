"""Options of a command as a file: read by `--config`, written into the folder of a run in full."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any

import typer
import yaml

from lottery_tickets.cli._criteria import Criterion
from lottery_tickets.errors import RunFolderError

SETTINGS = "run.yaml"  # in the folder of a run

_COMMAND = "command"
_OPTION = "--config"
_NOT_IN_FILES = ("config", "print_config", "help")


def take_settings(context: typer.Context, path: Path | None) -> Path | None:
    """Make the options in a file the defaults of the command; those that are typed go before them.

    Raises:
        BadParameter: A file that cannot be read, or an option that the command does not have.
    """
    if path is not None and not context.resilient_parsing:
        context.default_map = {**(context.default_map or {}), **_settings_in(path, context)}
    return path


def settings_text(command: str, arguments: Mapping[str, Any]) -> str:
    """Every option with its value, defaults included, as `--config` takes it."""
    told = {_spelled(name): _plain(value) for name, value in arguments.items()}
    return yaml.safe_dump({_COMMAND: command, **told}, sort_keys=False, allow_unicode=True)


@contextmanager
def settings_in(folder: Path, text: str) -> Iterator[Path]:
    """The settings of a run in its folder, for as long as there is a run.

    Where the folder turns out to be that of another run, it has its own settings again; where nothing came of the
    run, an option that is refused say, they are gone, and the folder too if it is new.
    """
    from lottery_tickets._atomic import replacing

    new = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SETTINGS
    before = path.read_bytes() if path.exists() else None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    try:
        yield path
    except Exception as error:
        another = isinstance(error, RunFolderError)
        if before is not None and another:
            with replacing(path) as temporary:
                temporary.write_bytes(before)
        elif before is None and (another or [*folder.iterdir()] == [path]):
            path.unlink()
        for one in new:
            if not any(one.iterdir()):
                one.rmdir()
        raise


def _settings_in(path: Path, context: typer.Context) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise typer.BadParameter(f"{path}: {problem}", param_hint=_OPTION) from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path}: not a list of 'option: value'", param_hint=_OPTION)
    name = context.command.name
    if found.pop(_COMMAND, name) != name:
        raise typer.BadParameter(f"{path}: it is of another command than {name}", param_hint=_OPTION)
    parameters = _by_spelling(context.command.params)
    taken = {}
    for key, value in found.items():
        parameter = parameters.get(str(key).replace("_", "-"))
        if parameter is None:
            near = get_close_matches(str(key), parameters, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise typer.BadParameter(f"{path}: {name} has no option {key!r}{hint}", param_hint=_OPTION)
        if value is not None:
            taken[parameter.name] = _for_parameter(parameter, value, f"{path}: {key}")
    return taken


def _by_spelling(parameters: Iterable[Any]) -> dict[str, Any]:
    """Each by all its long names, without the dashes in front."""
    found = {}
    for parameter in parameters:
        if parameter.name not in _NOT_IN_FILES:
            found[_spelled(parameter.name)] = parameter
            found |= {one[2:]: parameter for one in parameter.opts if one.startswith("--")}
    return found


def _for_parameter(parameter: Any, value: Any, where: str) -> Any:
    """The value as if it had been typed, but for what has a type of its own in YAML."""
    many = parameter.nargs == -1 or getattr(parameter, "multiple", False)
    if isinstance(value, Mapping) or (isinstance(value, list) and not many):
        raise typer.BadParameter(f"{where}: a single value is expected, got {value!r}", param_hint=_OPTION)
    if many:
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    return value if isinstance(value, bool) else str(value)


def _spelled(name: str) -> str:
    return name.rstrip("_").replace("_", "-")


def _plain(value: Any) -> Any:
    """As YAML has it."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Criterion):
        return value.name
    return str(value) if isinstance(value, Path) else value
