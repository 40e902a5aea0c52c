"""What importing costs above torch: seconds in fresh processes, and what is loaded.

    python benchmarks/import_time.py [--quick]

Python's compiled files are there beforehand, as they are from the second import on. Processes take turns.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import lottery_tickets
from _common import benchmark_parser, interleaved, keep, medians

ABOVE_TORCH = {
    "nothing more": "pass",
    "`import lottery_tickets`": "import lottery_tickets",
    "`from lottery_tickets import create_magnitude_mask`": "from lottery_tickets import create_magnitude_mask",
    "`from lottery_tickets import *`, which loads every module": "from lottery_tickets import *",
}
PROCESSES = {
    "`python -c pass`": ("-c", "pass"),
    "`python -c 'import torch'`": ("-c", "import torch"),
    "`lottery-tickets --help`": ("-m", "lottery_tickets", "--help"),
}
# What would take as long again, and is loaded where it is used.
HEAVY = ("numba", "scipy", "transformers", "matplotlib", "rich", "typer", "pandas")

MEASURE = """
import json, sys, time
start = time.perf_counter()
import torch
torchs = set(sys.modules)
between = time.perf_counter()
exec(sys.argv[1])
end = time.perf_counter()
print(json.dumps({"torch": between - start, "above": end - between, "new": sorted(set(sys.modules) - torchs)}))
"""


def python(*arguments: str) -> str:
    """What a fresh process prints."""
    source = str(Path(lottery_tickets.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=True, env=environment
    ).stdout


def above_torch(repeats: int) -> list[dict[str, Any]]:
    """Seconds of each import after torch's own, and modules that it adds."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ABOVE_TORCH}
    for turn in range(repeats + 1):
        for name, code in ABOVE_TORCH.items():
            measured = json.loads(python("-c", MEASURE, code))
            if turn:  # the first fills the disk's cache
                runs[name].append(measured)
    return [
        {
            "import": name,
            "torch_seconds": [run["torch"] for run in measured],
            "seconds": [run["above"] for run in measured],
            "median_seconds": statistics.median(run["above"] for run in measured),
            "modules": len(measured[0]["new"]),
            "heavy": sorted({one.partition(".")[0] for one in measured[0]["new"]} & set(HEAVY)),
        }
        for name, measured in runs.items()
    ]


def main() -> None:
    given = benchmark_parser(__doc__, "three runs of each").parse_args()
    repeats = 3 if given.quick else 15
    rows = above_torch(repeats)
    processes = interleaved(
        {name: lambda arguments=arguments: python(*arguments) for name, arguments in PROCESSES.items()}, repeats
    )
    results = {
        "repeats": repeats,
        "torch_seconds": statistics.median(second for row in rows for second in row["torch_seconds"]),
        "rows": rows,
        "process_seconds": processes,
        "median_process_seconds": medians(processes),
    }
    show(results)
    print(keep("import_time", results, given))


def show(results: dict[str, Any]) -> None:
    """For a reader."""
    table = Table(title=f"above torch's own {results['torch_seconds']:.2f} s")
    for heading in ("import", "seconds", "modules", "heavy ones"):
        table.add_column(heading)
    for row in results["rows"]:
        heavy = ", ".join(row["heavy"]) or "-"
        table.add_row(row["import"], f"{row['median_seconds']:.3f}", str(row["modules"]), heavy)
    for name, seconds in results["median_process_seconds"].items():
        table.add_row(name, f"{seconds:.3f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
