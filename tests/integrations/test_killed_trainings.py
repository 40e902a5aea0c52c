"""Trainings with our callbacks that are killed by SIGKILL, and gone on with from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from killing import Killer

# Functions in which they are killed, and the event in them before which that happens: while a mask is drawn, while
# its state is written, inside a step of the trainer.
MOMENTS = {
    "tune": {"look": 45, "write": 60},
    "fit": {"look": 45, "training_step": 30},
}


@pytest.fixture(scope="module")
def killer() -> Iterator[Killer]:
    with Killer() as started:
        yield started


@pytest.mark.parametrize("what", MOMENTS)
def test_a_killed_training_ends_with_the_bird_and_the_ticket_of_an_undisturbed_one(killer, tmp_path, what):
    undisturbed = killer.run(what, tmp_path / "undisturbed", count=False)["results"]
    for function, moment in MOMENTS[what].items():
        assert killer.run(what, tmp_path / "killed", kill_at=moment, kill_in=function)["killed"], function
    last = killer.run(what, tmp_path / "killed", seed=1, count=False)["results"]  # the checkpoint brings weights
    assert last.pop("passes") < undisturbed.pop("passes"), "it went on, and did not begin again"
    assert last == undisturbed
