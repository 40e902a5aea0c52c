"""Runs, tickets and scores in pictures: one HTML file to show and to keep, and figures for papers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lottery_tickets.reports._judgements import figure_of_barriers as figure_of_barriers
    from lottery_tickets.reports._paper import COLOURS as COLOURS
    from lottery_tickets.reports._paper import MARKERS as MARKERS
    from lottery_tickets.reports._paper import check_format as check_format
    from lottery_tickets.reports._paper import draw as draw
    from lottery_tickets.reports._paper import figure_class as figure_class
    from lottery_tickets.reports._rounds import figures_of_rounds as figures_of_rounds
    from lottery_tickets.reports._rounds import scores_of as scores_of
    from lottery_tickets.reports._searches import figure_of_distances as figure_of_distances
    from lottery_tickets.reports._searches import masks_of_checks as masks_of_checks
    from lottery_tickets.reports._writing import write_figures, write_report

__all__ = ["write_figures", "write_report"]

# The others serve the command line, which draws single figures too.
_HOMES = {
    "_writing": ("write_figures", "write_report"),
    "_paper": ("COLOURS", "MARKERS", "check_format", "draw", "figure_class"),
    "_rounds": ("figures_of_rounds", "scores_of"),
    "_judgements": ("figure_of_barriers",),
    "_searches": ("figure_of_distances", "masks_of_checks"),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        for home, names in _HOMES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{home}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
