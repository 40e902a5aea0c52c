"""What the benchmarks share: the machine they ran on, peak memory in a fresh process, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("lottery-tickets", "torch", "numpy", "numba")
MIB = 1 << 20
GIB = 1 << 30


def machine() -> dict[str, Any]:
    """Processor, cores, memory, and the versions that matter."""
    return {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def peak_above(work: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process, while `work` runs, rises above what it is before.

    Linux only. Meant for a process that has done nothing else: what the allocator already holds is reused.
    """
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew from here
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def in_fresh_process(script: str | Path, *arguments: object) -> Any:
    """What `script` prints, read as JSON, when it runs in a process of its own with these arguments."""
    command = [sys.executable, str(script), *map(str, arguments)]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout)


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Write `results` and the machine to benchmarks/results/<name>.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    return path


def _memory(field: str) -> int:
    value = _first_value("/proc/self/status", field)
    return int(value.split()[0]) * 1024


def _first_value(path: str, field: str) -> str:
    for line in Path(path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""
