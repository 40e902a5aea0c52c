"""Runs, tickets and scores in pictures: one HTML file to show and to keep, and figures for papers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lottery_tickets.reports._writing import write_figures, write_report

__all__ = ["write_figures", "write_report"]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in __all__:
            return getattr(import_module(f"{__name__}._writing"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
