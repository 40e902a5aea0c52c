"""What all commands share: their common options, how they print, and how they fail.

A command is a function from a `Session` and its own arguments to a `Report`; it prints nothing to stdout itself.
"""

from __future__ import annotations

import inspect
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec, TextIO

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from lottery_tickets.cli._app import program
from lottery_tickets.cli._launched import is_first, launched, launcher, process_group
from lottery_tickets.cli._settings import settings_in, settings_text, take_settings
from lottery_tickets.cli._told import json_text, told
from lottery_tickets.errors import DistributedError, LotteryTicketError, MemoryPlanError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

P = ParamSpec("P")

new_table = partial(Table, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)  # how all tables look

JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON, and nothing else, to stdout.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; errors only.")]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done to stderr.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

MemoryOption = Annotated[
    bool, typer.Option("--no-memory-check", help="Go on where more memory is needed than is free.")
]

ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="Take options from a YAML file; those that are typed go before them.",
        callback=take_settings,
        is_eager=True,
        show_default=False,
    ),
]
PrintConfigOption = Annotated[
    bool,
    typer.Option("--print-config", help="Print all options as such a file, defaults included, and do nothing."),
]

# Each with its default.
_COMMON: dict[str, tuple[Any, Any]] = {
    "config": (ConfigOption, None),
    "print_config": (PrintConfigOption, False),
    "json_": (JsonOption, False),
    "quiet": (QuietOption, False),
    "verbose": (VerboseOption, False),
    "debug": (DebugOption, False),
}
_INTERRUPTED = 130  # as shells have it: 128 and the number of the signal
# While they are imported, by transformers, these tell of kernels for other machines and of names that are to go.
_CHATTERING = ("torchao", "torch.utils._pytree")
_PIPE_WIDTH = 120  # columns where there is no terminal to ask


@dataclass
class Session:
    """How one run of the command talks to its user.

    Attributes:
        quiet: No progress and no notes.
        command: Its name.
        options: Every argument and option of the command's own, with its value.
        group: Processes that work on it together; None for this one alone.
        resume: What to do to go on after an interruption; None where there is nothing to go on with.
    """

    quiet: bool
    command: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    group: ProcessGroup | None = None
    resume: str | None = None

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""
        return is_first()

    @property
    def progress(self) -> bool:
        """Whether to show bars: on a terminal, unless silenced."""
        return not self.quiet and self.first and sys.stderr.isatty()

    def note(self, text: str) -> None:
        """A line on stderr, unless silenced."""
        if not self.quiet and self.first:
            typer.echo(text, err=True)

    def settle(self, **options: Any) -> None:
        """Say what options have come to whose defaults hang on more than other options: on a run, on data."""
        self.options.update(options)

    @contextmanager
    def run_in(self, folder: Path) -> Iterator[None]:
        """Have the options in the folder of a run, from which `--config` takes them to go on."""
        if not self.first:
            yield
            return
        with settings_in(folder, settings_text(self.command, self.options)) as path:
            by = launcher() if launched() else program()
            again = f"{by or program()} {self.command} --config {shlex.quote(str(path))}"
            how = "to go on" if by else "to go on, by what started these processes"
            self.resume = f"{folder} holds what was finished; {how}:\n  {again}"
            yield


@dataclass(frozen=True)
class Report:
    """What a command found: `data` for `--json`, `show` for a reader; `failed` if it is not as it should be."""

    data: Mapping[str, Any]
    show: Callable[[Console], None]
    failed: bool = False


def command(
    app: typer.Typer,
    name: str,
    *examples: str,
    asks_memory: bool = False,
    on_ranks: bool = False,
    defaults: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Callable[[Callable[P, Report]], Callable[..., None]]:
    """Register a function as a command with the common options, examples in its help, and one-line errors.

    Args:
        app: Where to.
        name: The command's name.
        examples: Command lines for the help.
        asks_memory: It calls what refuses to start where memory is short, and gets an option against that.
        on_ranks: It works on several processes together, as torchrun starts them.
        defaults: What options come to that are not given and hang on others, by all of them.
    """

    def register(function: Callable[P, Report]) -> Callable[..., None]:
        @wraps(function)
        def run(
            config: Path | None,
            print_config: bool,
            json_: bool,
            quiet: bool,
            verbose: bool,
            debug: bool,
            no_memory_check: bool = False,
            **arguments: Any,
        ) -> None:
            session = Session(quiet, name, arguments)
            with _one_line_errors(debug):
                by_others = {} if defaults is None else defaults(arguments)
                session.settle(**{key: one for key, one in by_others.items() if arguments[key] in (None, [])})
            if print_config:
                typer.echo(settings_text(name, session.options), nl=False)
                return
            with (
                _one_line_errors(debug),
                _interruption(session),
                _logging(verbose, debug),
                _one_line_warnings(quiet or not is_first()),
                _memory(unchecked=no_memory_check),
                process_group(name, possible=on_ranks) as group,
            ):
                session.group = group
                report = function(session, **session.options)  # type: ignore[arg-type]
                if not is_first():
                    return
                if json_:
                    typer.echo(json_text(told(name, report.data)))
                else:
                    report.show(
                        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False)
                    )
                if report.failed:
                    raise typer.Exit(1)

        signature = inspect.signature(function, eval_str=True)
        own = [parameter for key, parameter in signature.parameters.items() if key != "session"]
        options = {**_COMMON, **({"no_memory_check": (MemoryOption, False)} if asks_memory else {})}
        common = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for key, (annotation, default) in options.items()
        ]
        parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + common
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        epilog = "\n\n".join(["Example:" if len(examples) == 1 else "Examples:", *examples])
        paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
        # A terminal has lines of its own length.
        help_text = "\n\n".join(paragraph.replace("\n", " ") for paragraph in paragraphs)
        app.command(name, help=help_text, epilog=epilog)(run)
        return run

    return register


def number(value: float | None, digits: int) -> str:
    """A measured number for a table, with so many digits after the point while they say something."""
    if value is None:
        return "-"
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.2e}"


def with_interval(value: float | None, interval: Sequence[float] | None, digits: int) -> str:
    """A measured number and below it its interval, where there is one."""
    if interval is None:
        return number(value, digits)
    return f"{number(value, digits)}\n[{number(interval[0], digits)}, {number(interval[1], digits)}]"


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Exit code 1 and a line on stderr for whatever went wrong; usage errors stay typer's, exit code 2."""
    try:
        yield
    except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        if not is_first():
            # Rank 0 says what all were told, if it is still there.
            if isinstance(error, DistributedError):
                _fail(f"rank {os.environ['RANK']}: {error}")
            raise typer.Exit(1) from None
        if isinstance(error, MemoryPlanError):
            typer.echo(f"error: {error}\n--no-memory-check goes on all the same.", err=True)
            raise typer.Exit(1) from None
        if isinstance(error, (LotteryTicketError, OSError)):
            _fail(_described(error))
        _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)")


@contextmanager
def _interruption(session: Session) -> Iterator[None]:
    """Exit code 130 and how to go on, where the user ends it by Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        if session.first:
            typer.echo(f"\ninterrupted: {session.resume}" if session.resume else "\ninterrupted", err=True)
        raise typer.Exit(_INTERRUPTED) from None


@contextmanager
def _memory(*, unchecked: bool) -> Iterator[None]:
    """Whether operations ask for their memory before they start."""
    if not unchecked:
        yield
        return
    from lottery_tickets import planning

    with planning.unchecked():
        yield


def _described(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)


def _fail(message: str) -> None:
    typer.echo("error: " + " ".join(message.split()), err=True)
    raise typer.Exit(1)


@contextmanager
def _one_line_warnings(quiet: bool) -> Iterator[None]:
    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        warnings.showwarning = show
        yield


@contextmanager
def _logging(verbose: bool, debug: bool) -> Iterator[None]:
    logger = logging.getLogger("lottery_tickets")
    handler: logging.StreamHandler[TextIO] = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    chattering = [] if verbose or debug else [logging.getLogger(name) for name in _CHATTERING]
    levels = {one: one.level for one in (logger, *chattering)}
    logger.addHandler(handler)
    for one in chattering:
        one.setLevel(logging.ERROR)
    usual = logging.WARNING if is_first() else logging.ERROR
    logger.setLevel(logging.DEBUG if debug else logging.INFO if verbose else usual)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for one, level in levels.items():
            one.setLevel(level)
