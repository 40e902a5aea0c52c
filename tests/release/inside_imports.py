"""Run in the bare environment: packages that are loaded when all of the library is, beside Python's and torch's.

Prints them as JSON.
"""

from __future__ import annotations

import json
import sys

import torch  # noqa: F401


def loaded() -> set[str]:
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names


torchs = loaded()

from inside_examples import things  # noqa: E402

names = [name for name, _ in things()]
assert "lottery_tickets.compute_ticket_verdict" in names
print(json.dumps(sorted(loaded() - torchs - {"inside_examples"})))
