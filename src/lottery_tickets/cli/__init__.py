"""The command line, `lottery-tickets`: parse, call, print.

Modules here import torch and the library inside their functions, so that `--help` answers at once.
"""

from lottery_tickets.cli import (  # noqa: F401  # to register their commands
    _compare,
    _demo,
    _draw,
    _early_bird,
    _imp,
    _judge,
    _plan_memory,
    _report,
    _score,
    _stability,
    _structured,
    _tickets,
    _verdict,
)
from lottery_tickets.cli._app import app, main

__all__ = ["app", "main"]
