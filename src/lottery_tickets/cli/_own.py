"""What is the user's own, named as `package.module:function`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import typer

from lottery_tickets.errors import TrainingError


def check_spelling(option: str, spec: str) -> None:
    """Refuse, before anything is imported, what is no `package.module:function`.

    Raises:
        BadParameter: It is none.
    """
    module, colon, name = spec.partition(":")
    parts = [*module.split("."), *name.split(".")]
    if not colon or not all(part.isidentifier() for part in parts):
        raise typer.BadParameter(f"{spec!r} is not of the form package.module:function", param_hint=option)


def own(option: str, spec: str) -> Callable[..., Any]:
    """The function of that name, from the current directory or what is installed.

    Raises:
        TrainingError: A module that cannot be imported, or that has no such function.
    """
    module_name, _, name = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it; who installed the command has not
    try:
        found: Any = import_module(module_name)
    except Exception as error:  # whatever a module of the user's does when it is imported
        raise TrainingError(
            f"{option} {spec}: {module_name} cannot be imported ({type(error).__name__}: {error}). Modules are "
            "looked for in the current directory and among what is installed."
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise TrainingError(f"{option} {spec}: {module_name} has no {name}.")
        found = getattr(found, part)
    if not callable(found):
        raise TrainingError(f"{option} {spec}: a function or a class is expected, got {type(found).__name__}.")
    return found  # type: ignore[no-any-return]


def called(option: str, spec: str, function: Callable[..., Any], seed: int) -> Any:
    """What the function returns, given the seed if it has a parameter for it.

    That is one called `seed`, or the only one that must be given.

    Raises:
        TrainingError: The function raised an error.
    """
    try:
        parameters = dict(inspect.signature(function).parameters)
    except ValueError:  # some that are written in C tell nothing of themselves
        parameters = {}
    needed = [one for one in parameters.values() if one.default is one.empty and one.kind in _POSITIONAL]
    try:
        if "seed" in parameters:
            return function(seed=seed)
        return function(seed) if len(needed) == 1 else function()
    except Exception as error:
        raise TrainingError(f"{option} {spec}: {type(error).__name__}: {error} (--debug shows where)") from error


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
