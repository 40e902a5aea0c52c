"""The lottery ticket papers, again: LeNet-300-100 with its controls, and a small CNN that has to be rewound.

    python benchmarks/reproduce.py [--runs FOLDER] [--jobs N] [--seeds N] [--data fashion-mnist|mnist]
        [--only lenet|cnn] [--quick]

`make reproduce` runs it. First it tells how long it will take. Each seed of each experiment is a unit of its own,
`--jobs` of them at a time, each on one thread. A unit can be killed at any moment: called again, the script goes
on in the same folder, and does nothing again that is done. After every unit benchmarks/results/reproduce.json is
written from those that are finished, and `python benchmarks/figures.py` draws docs/figures/ from it. The quick
form is one seed of few rounds on the digits of MNIST, in a folder that goes afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from _common import benchmark_parser, keep
from _reproduce import cnn, lenet
from _reproduce._training import once
from lottery_tickets.vision import DATASETS

EXPERIMENTS: dict[str, Any] = {"lenet": lenet, "cnn": cnn}
RUNS = Path("reproduce")
SEEDS = 3


def unit(experiment: str, seed: int, runs: Path, data: str) -> None:
    """One seed of one experiment, in this process."""
    torch.set_num_threads(1)
    folder, start = runs / f"{experiment}-{seed}", time.perf_counter()

    def tell(what: str) -> None:
        print(f"{experiment} {seed}: {what} after {time.perf_counter() - start:,.0f} s", flush=True)

    once(folder / "unit.json", lambda: EXPERIMENTS[experiment].run(DATASETS[data](), seed, folder, tell))


def found_in(runs: Path, data: str, seeds: int) -> dict[str, Any]:
    """What the units that are finished found; nothing if none is."""
    found = {
        experiment: [
            json.loads(path.read_text(encoding="utf-8"))
            for seed in range(seeds)
            if (path := runs / f"{experiment}-{seed}" / "unit.json").exists()
        ]
        for experiment in EXPERIMENTS
    }
    if not any(found.values()):
        return {}
    told = {
        experiment: {"settings": EXPERIMENTS[experiment].SETTINGS, "seeds": units}
        for experiment, units in found.items()
        if units
    }
    command = f"python benchmarks/reproduce.py --seeds {seeds} --data {data}"
    return {"command": command, "data": data, **told}


def write(chosen: argparse.Namespace) -> None:
    """The result file, as far as units are finished; a quick form writes once, when all are."""
    if found := {} if chosen.quick else found_in(chosen.runs, chosen.data, chosen.seeds):
        print(keep("reproduce", found, chosen), flush=True)


def main() -> None:
    """Run all units that are not finished."""
    parser = benchmark_parser(__doc__, "one seed of few rounds on MNIST digits")
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs are kept")
    parser.add_argument("--jobs", type=int, default=1, help="units at a time")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--data", choices=list(DATASETS), default="fashion-mnist")
    parser.add_argument("--only", choices=list(EXPERIMENTS), help="one of the experiments")
    parser.add_argument("--unit", help=argparse.SUPPRESS)  # one unit, in a process that the script starts
    chosen = parser.parse_args()
    if chosen.quick:
        for experiment in EXPERIMENTS.values():
            experiment.SETTINGS.update(experiment.QUICK)
    if chosen.unit:
        experiment, _, seed = chosen.unit.partition(":")
        unit(experiment, int(seed), chosen.runs, chosen.data)
    elif chosen.quick:
        with tempfile.TemporaryDirectory() as scratch:
            chosen.runs, chosen.data, chosen.seeds = Path(scratch), "mnist", 1
            run_units(chosen)
            print(keep("reproduce", found_in(chosen.runs, chosen.data, chosen.seeds), chosen))
    else:
        run_units(chosen)


def run_units(chosen: argparse.Namespace) -> None:
    """All units that are not finished, and the result file after each."""
    names = [chosen.only] if chosen.only else list(EXPERIMENTS)
    units = [(name, seed) for seed in range(chosen.seeds) for name in names]
    waiting = [(name, seed) for name, seed in units if not (chosen.runs / f"{name}-{seed}" / "unit.json").exists()]
    torch.set_num_threads(1)
    images = DATASETS[chosen.data]()
    expected = {name: EXPERIMENTS[name].seconds(images) for name in {name for name, _ in waiting}}
    seconds = sum(expected[name] for name, _ in waiting) / chosen.jobs
    print(
        f"{len(waiting)} of {len(units)} units to do, about {seconds / 60:,.0f} minutes; {chosen.runs}", flush=True
    )

    def started(name: str, seed: int) -> int:
        options = ["--runs", str(chosen.runs), "--data", chosen.data, "--unit", f"{name}:{seed}"]
        options += ["--quick"] if chosen.quick else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run([sys.executable, __file__, *options], check=False, env=environment).returncode

    failed = []
    with ThreadPoolExecutor(chosen.jobs) as pool:
        futures = {pool.submit(started, *one): one for one in waiting}
        for future in as_completed(futures):
            if future.result():
                failed.append(futures[future])
            write(chosen)
    write(chosen)
    if failed:
        sys.exit(f"failed: {', '.join(f'{name} {seed}' for name, seed in failed)}; call again to go on with them")


if __name__ == "__main__":
    main()
