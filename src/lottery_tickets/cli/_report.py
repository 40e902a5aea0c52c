"""`report`: runs and tickets as one page, and their figures for papers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._app import app
from lottery_tickets.cli._shell import Report, Session, command


@command(
    app,
    "report",
    "lottery-tickets report runs/lenet -o lenet.html",
    "lottery-tickets report runs/lenet runs/bird tickets/magnitude-0.5.safetensors -o all.html --figures figures",
)
def report(
    session: Session,
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, results of commands as JSON, tickets, files of scores.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page, an HTML file.")],
    title: Annotated[
        str | None, typer.Option(help="Of the page. Default: that of the first RUN.", show_default=False)
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Draw every figure for papers too, as SVG and PNG.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a page that exists.")] = False,
) -> Report:
    """Show what came of runs in one HTML file that holds all it needs: curves, matrices, tables, settings.

    A run of `imp` is told with the verdicts and stability analyses in its folder. Tickets of all that is named are
    laid beside each other. The page opens from disk, in light and in dark, and asks no server for anything.
    """
    if output.exists() and not force:
        raise FileExistsError(f"{output}: there already; --force replaces.")

    from lottery_tickets.reports import write_figures, write_report

    page = write_report(runs, output, title=title)
    drawn = [] if figures is None else write_figures(runs, figures)
    data: dict[str, Any] = {
        "report": str(page),
        "bytes": page.stat().st_size,
        "figures": [str(path) for path in drawn],
    }
    return Report(data, lambda console: _show(console, data))


def _show(console: Console, data: dict[str, Any]) -> None:
    console.print(f"{data['report']}: {data['bytes'] / 1024:,.0f} KiB; open it in any browser.", soft_wrap=True)
    if data["figures"]:
        console.print(f"{len(data['figures'])} figures in {Path(data['figures'][0]).parent}", soft_wrap=True)
