"""Runs killed by SIGKILL at random moments, and called again each time, end like undisturbed ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from killing import Killer
from test_early_bird import lines

OPTIONS: dict[str, dict[str, Any]] = {
    "search": {
        "check_every_steps": 1,
        "momentum": 0.9,
        "stability_window": 1000,  # so that it does not end before its time
        "target_sparsity": [0.5, 0.7],
    },
    "prune": {
        "save_every_steps": 1,
        "rewind_step": 5,
        "num_iterations": 4,
        "optimizer": "sgd",
        "momentum": 0.9,
    },
}
EPOCHS = {"search": "max_epochs", "prune": "epochs"}
TIMES = {"seconds", "check_seconds", "peak_bytes"}
# Functions inside of which something is half written, and the event in them before which the process is killed.
WRITING = {"_written": 40, "_sync": 90, "write_tensors": 60, "record": 25, "replacing": 12}


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as started:
        yield started


def measured(folder: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines(folder)]


def same(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["results"] == second["results"]
    assert measured(folder / "killed") == measured(folder / "undisturbed")


def reached(folder: Path) -> int:
    """How many states have been saved; 0 before the first."""
    states = sorted(folder.glob("state-*"))
    return int(states[-1].name.removeprefix("state-")) + 1 if states else 0


def kill_and_compare(
    killer: Killer, what: str, folder: Path, times: int, shares: tuple[float, float], epochs: int
) -> None:
    """Kill it so many times, each when a share of an undisturbed run's calls between these two is made."""
    options, stream, seen = {**OPTIONS[what], EPOCHS[what]: epochs}, random.Random(20), []
    undisturbed = killer.run(what, folder / "undisturbed", **options)
    for _ in range(times):
        moment = stream.randrange(*(int(share * undisturbed["calls"]) for share in shares))
        assert killer.run(what, folder / "killed", kill_at=moment, **options)["killed"], seen
        seen.append(reached(folder / "killed"))
    assert seen == sorted(seen)
    assert len(set(seen)) > times // 2, f"killed at moments too much alike: {seen}"
    last = killer.run(what, folder / "killed", seed=1, **options)  # the state brings the weights
    same(folder, last, undisturbed)
    assert last["calls"] < undisturbed["calls"], "it went on, and did not begin again"


@pytest.mark.parametrize("what", OPTIONS)
def test_a_killed_run_ends_like_an_undisturbed_one(killer, tmp_path, what):
    kill_and_compare(killer, what, tmp_path, times=2, shares=(0.25, 0.5), epochs=6 if what == "search" else 2)


@pytest.mark.slow
@pytest.mark.parametrize("what", OPTIONS)
def test_a_run_killed_at_twenty_random_moments_ends_like_an_undisturbed_one(killer, tmp_path, what):
    kill_and_compare(killer, what, tmp_path, times=20, shares=(0, 0.075), epochs=50 if what == "search" else 10)


def test_a_run_killed_while_it_writes_ends_like_an_undisturbed_one(killer, tmp_path):
    options = {**OPTIONS["prune"], "epochs": 2}
    undisturbed = killer.run("prune", tmp_path / "undisturbed", **options)
    for function, moment in WRITING.items():
        order = {"kill_at": moment, "kill_in": function, **options}
        assert killer.run("prune", tmp_path / "killed", **order)["killed"], function
    assert reached(tmp_path / "killed") > len(WRITING)
    last = killer.run("prune", tmp_path / "killed", **options)
    same(tmp_path, last, undisturbed)
