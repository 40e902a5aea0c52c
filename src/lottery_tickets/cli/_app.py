"""The command itself: its name, its help and its exit codes."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="lottery-tickets",
    help="Find and judge lottery tickets: exact sparse masks for language models.",
    epilog="Exit codes: 0 done, 1 an error (one line on stderr; --debug shows the traceback), 2 wrong usage, "
    "130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lottery-tickets {version('lottery-tickets')}")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Hold the options that come before a command."""


def program() -> str:
    """What the user types to run this command."""
    if shutil.which("lottery-tickets"):
        return "lottery-tickets"
    return sys.argv[0] if Path(sys.argv[0]).name == "lottery-tickets" else "python -m lottery_tickets"


def main() -> None:
    """Run the command line; the console script `lottery-tickets`."""
    app()
