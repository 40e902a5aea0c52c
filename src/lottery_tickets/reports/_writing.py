"""Reports and figures as files."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from lottery_tickets._atomic import replacing
from lottery_tickets.errors import ReportError
from lottery_tickets.reports._page import html_of
from lottery_tickets.reports._paper import check_format, draw
from lottery_tickets.reports._sources import document_of

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def write_report(runs: Paths, output: str | os.PathLike[str], *, title: str | None = None) -> Path:
    """One HTML file that shows what came of runs, and opens from disk without a network.

    A run's folder is told with the verdicts and stability analyses that lie in it. Tickets of all that is given
    are laid beside each other by their Jaccard index. Names of layers, and whatever else a file says, are
    escaped; the page's Content-Security-Policy admits its own style and script and no connection.

    Args:
        runs: Folders that `early-bird`, `imp`, `verdict` or `stability` wrote, results of commands as JSON (of
            `compare -o`, `plan --json`, `demo --json`), benchmarks/results/reproduce.json, tickets, files of
            scores; one or several.
        output: The file; one that exists is replaced, whole or not at all.
        title: Of the page; None for that of the first run.

    Returns:
        The file's path.

    Raises:
        ReportError: Nothing to report at a path, a run that has not ended, or a file that is damaged.
        MissingExtraError: Jinja2 or vl-convert is not installed.

    Example:
        >>> import torch
        >>> from lottery_tickets import Mask
        >>> from lottery_tickets.reports import write_report
        >>> mask = Mask.from_tensors({"fc.weight": torch.tensor([[True, False], [False, True]])})
        >>> mask.save("ticket.safetensors")
        >>> write_report("ticket.safetensors", "report.html").read_text(encoding="utf-8")[:15]
        '<!DOCTYPE html>'
    """
    document = document_of(_listed(runs), title)
    page, path = html_of(document), Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def write_figures(
    runs: Paths, folder: str | os.PathLike[str], *, formats: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Every figure of a report as a file of its own, for papers, drawn by matplotlib.

    Args:
        runs: As for `write_report`.
        folder: Where to; made if it is not there. Files are called by the number of the part and what they show.
        formats: Suffixes that matplotlib knows.

    Returns:
        The files.

    Raises:
        ReportError: Nothing to report at a path, or a format that is not known.
        MissingExtraError: matplotlib is not installed.

    Example:
        >>> import torch
        >>> from lottery_tickets import Mask
        >>> from lottery_tickets.reports import write_figures
        >>> mask = Mask.from_tensors({"fc.weight": torch.tensor([[True, False], [False, True]])})
        >>> mask.save("ticket.safetensors")
        >>> [path.name for path in write_figures("ticket.safetensors", "figures", formats=["svg"])]
        ['1-layers.svg']
    """
    target = Path(folder)
    for suffix in formats:
        check_format(Path(f"figure.{suffix}"), "formats:")
    document = document_of(_listed(runs))
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for place, section in enumerate(document.sections, 1):
        for figure in section.figures:
            for suffix in formats:
                path = target / f"{place}-{_plain_name(figure.slug)}.{suffix}"
                draw([figure], path, figure.title)
                written.append(path)
    return written


def _listed(runs: Paths) -> list[Path]:
    listed = [runs] if isinstance(runs, (str, os.PathLike)) else list(runs)
    if not listed:
        raise ReportError("runs is empty; name at least one run, ticket or file of scores.")
    missing = [str(path) for path in listed if not Path(path).exists()]
    if missing:
        raise ReportError(f"{', '.join(missing)}: no such file or folder.")
    return [Path(path) for path in listed]


def _plain_name(slug: str) -> str:
    return re.sub(r"[^a-z0-9-]+", "-", slug.lower())
