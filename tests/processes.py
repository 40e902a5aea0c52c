"""A process of its own, for what a test cannot see from inside: memory's peak, and what an import brings along."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import lottery_tickets

PEAK = '''
def peak():
    """The most bytes this process ever had in memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
'''


def run_python(code: str, *arguments: object) -> str:
    """What the code prints, run with the package under test and two threads."""
    source = str(Path(lottery_tickets.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
