"""A search killed by SIGKILL at random moments, and called again each time, ends like an undisturbed one."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from killing import Killer
from test_early_bird import lines

KILLED = {
    "check_every_steps": 1,
    "momentum": 0.9,
    "stability_window": 1000,  # so that it does not end before its time
    "target_sparsity": [0.5, 0.7],
}


def kill_and_compare(folder: Path, times: int, epochs: int) -> None:
    options, stream, reached = {**KILLED, "max_epochs": epochs}, random.Random(20), []
    with Killer() as killer:
        undisturbed = killer.search(folder / "undisturbed", **options)
        for _ in range(times):
            moment = stream.randrange(undisturbed["calls"] // times)
            assert killer.search(folder / "killed", kill_at=moment, **options)["killed"], reached
            states = sorted((folder / "killed").glob("state-*"))
            reached.append(int(states[-1].name.removeprefix("state-")) if states else -1)
        assert reached == sorted(reached)
        assert len(set(reached)) > times // 2, f"killed at moments too much alike: {reached}"
        last = killer.search(folder / "killed", seed=1, **options)  # the state brings the weights
    assert last["results"] == undisturbed["results"]
    assert lines(folder / "killed") == lines(folder / "undisturbed")
    assert last["calls"] < undisturbed["calls"], "it went on, and did not begin again"


def test_a_killed_run_ends_like_an_undisturbed_one(tmp_path):
    kill_and_compare(tmp_path, times=2, epochs=6)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_like_an_undisturbed_one(tmp_path):
    kill_and_compare(tmp_path, times=20, epochs=50)
