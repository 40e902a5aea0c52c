"""Every benchmark in its quick form, one after the other, into one file.

    python benchmarks/run_all.py [--only NAME ...] [--json FILE]

Each runs in a process of its own, with what it prints shown. The file, benchmarks/results/run_all.json, holds the
machine, the versions and what each benchmark found; docs/measurements-quick.md is rendered from it by
`python benchmarks/tables.py`. With --only the others' figures stay in the file if it is of the same machine. The
script ends with an error that names them if benchmarks failed; those are not in the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import RESULTS, write_results

HERE = Path(__file__).parent
BENCHMARKS = (
    *("selection", "streaming", "quality_from_disk", "distributed", "evaluation", "scoring", "criteria"),
    *("restoring", "early_bird_optimizers", "early_bird_memory", "early_bird_check", "rank_correlation", "imp"),
    *("reproduce", "structured", "early_bird_channels", "deployment", "import_time", "memory_plan"),
)


def run(name: str, folder: Path) -> dict[str, Any] | None:
    """What a benchmark found in its quick form, and the seconds that took; None if it failed."""
    command = [sys.executable, str(HERE / f"{name}.py"), "--quick", "--results", str(folder)]
    start = time.perf_counter()
    print(f"\n=== {name}", flush=True)
    if subprocess.run(command, check=False).returncode:
        return None
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return {"seconds": round(time.perf_counter() - start, 1), "results": found}


def earlier(path: Path) -> dict[str, Any]:
    """Benchmarks that are in the file already."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return found


def main() -> None:
    """Run, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--json", type=Path, default=RESULTS / "run_all.json", help="the file to write")
    given = parser.parse_args()
    names = given.only or BENCHMARKS
    with tempfile.TemporaryDirectory() as scratch:
        found = {name: run(name, Path(scratch)) for name in names}
    done = {**(earlier(given.json) if given.only else {}), **{name: one for name, one in found.items() if one}}
    ordered = {name: done[name] for name in BENCHMARKS if name in done}
    assert given.json.suffix == ".json"
    print(f"\nwritten to {write_results(given.json.stem, {'benchmarks': ordered}, given.json.parent)}")
    if failed := [name for name, one in found.items() if one is None]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
