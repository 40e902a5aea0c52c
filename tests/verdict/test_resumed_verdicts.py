"""Verdicts that were left, killed or asked for more: what is finished stays, and the end is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import lottery_tickets
from lottery_tickets import Mask
from lottery_tickets.errors import RunFolderError
from verdicts import blind_ticket, make_model, seeing_ticket, told, verdict

SMALL: dict[str, Any] = {
    "seeds": (0, 1),
    "controls": ("dense", "random_reinit", "early_bird"),
    "epochs": 2,
    "optimizer": "adam",
    "learning_rate": 0.01,
}


class Counting:
    """Makes the models, and counts them."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.calls, self._fail_at = 0, fail_at

    def __call__(self, seed: int) -> torch.nn.Module:
        if self.calls == self._fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        return make_model(seed)


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed():
    return told(verdict(**SMALL))


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# A verdict makes a model for the folder's configuration, one for each training, and one for each early bird.
@pytest.mark.parametrize("fail_at", [0, 1, 4, 5, 8])
def test_a_verdict_that_was_left_goes_on(tmp_path, fail_at, undisturbed):
    with pytest.raises(KeyboardInterrupt):
        verdict(model=Counting(fail_at), run_dir=tmp_path, **SMALL)
    finished = len(lines(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
    rest = Counting()
    assert told(verdict(model=rest, run_dir=tmp_path, **SMALL)) == undisturbed
    birds = sum(one["network"] == "early_bird" for one in undisturbed["trainings"][finished:])
    assert rest.calls == 1 + 8 - finished + birds
    assert len(lines(tmp_path)) == 8


def test_what_is_finished_is_not_trained_again(tmp_path, undisturbed):
    verdict(model=Counting(), run_dir=tmp_path, **SMALL)
    asked = []

    def ticket(seed: int) -> Mask:
        asked.append(seed)
        return seeing_ticket()

    models = Counting()
    again = verdict(ticket, model=models, run_dir=tmp_path, **{**SMALL, "confidence": 0.8, "judged_at": "end"})
    assert again["confidence"] == 0.8
    assert told(again)["trainings"] == undisturbed["trainings"]
    assert models.calls == 1
    assert asked == []


def test_more_seeds_and_controls_are_added_to_what_is_there(tmp_path):
    whole = {**SMALL, "seeds": (0, 1, 2), "controls": ("dense", "random_reinit", "random_mask")}
    few = {**SMALL, "controls": ("dense", "random_reinit")}
    first = verdict(run_dir=tmp_path, **few)
    more = verdict(run_dir=tmp_path, **whole)
    assert told(more) == told(verdict(**whole))
    kept = [one for one in more["trainings"] if one["network"] != "random_mask" and one["seed"] != 2]
    assert kept == first["trainings"], "seconds and all"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epochs": 3}, "epochs: 2 there, 3 now"),
        ({"learning_rate": 0.02}, "learning_rate: 0.01 there, 0.02 now"),
        ({"eval_every_steps": 3}, "eval_every_steps"),
        ({"ticket": [blind_ticket(), blind_ticket()]}, "trainings of another ticket for seed 0"),
        (
            {"ticket": blind_ticket, "seeds": (1, 0), "controls": ("dense", "random_mask")},
            "another ticket for seed 1",
        ),
        ({"resume": False}, "holds a run already"),
    ],
)
def test_a_folder_is_one_verdicts(tmp_path, changes, match):
    options = {**SMALL, "controls": ("dense",)}
    verdict(run_dir=tmp_path, **options)
    with pytest.raises(RunFolderError, match=match):
        verdict(run_dir=tmp_path, **{**options, **changes})


def test_another_initial_is_another_run(tmp_path):
    ticket, options = seeing_ticket(), {**SMALL, "controls": ("dense",)}
    weights = {name: one.clone() for name, one in make_model(5).state_dict().items()}
    verdict(ticket, initial=weights, run_dir=tmp_path, **options)
    weights["0.bias"] = weights["0.bias"] + 1
    with pytest.raises(RunFolderError, match="initial"):
        verdict(ticket, initial=weights, run_dir=tmp_path, **options)


def test_one_ticket_keeps_its_weights_when_seeds_are_added(tmp_path):
    options = {**SMALL, "controls": ("dense",), "run_dir": tmp_path}
    verdict(seeing_ticket(), **options)
    more = verdict(seeing_ticket(), **{**options, "seeds": (0, 1, 2)})
    assert len({one["weights"] for one in more["trainings"]}) == 1
    with pytest.raises(RunFolderError, match=r"on the weights of make_model\(0\), .* add seeds behind it"):
        verdict(seeing_ticket(), **{**options, "seeds": (1, 0)})


# ---------------------------------------------------------------- killed

SCRIPT = """
import json, os, signal, sys
from itertools import count

import torch
torch.set_num_threads(1)
from verdicts import told, verdict

folder, kind, kill_at, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4])
verdict(**options)  # what is imported and compiled when it is first used does not count
calls = count()

def killing(*_):
    if next(calls) == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)

def fsync(descriptor, sync=os.fsync):
    killing()
    sync(descriptor)

if kind == "writes":
    os.fsync = fsync
else:
    sys.setprofile(killing)
results = verdict(run_dir=folder, **options)
sys.setprofile(None)
print(json.dumps({"results": told(results), "calls": next(calls)}))
"""


def in_a_process(folder: Path, kind: str, kill_at: int) -> dict[str, Any] | None:
    """What a verdict came to, and how many calls or writes it took; None if it was killed at one of them."""
    source, tests = Path(lottery_tickets.__file__).parents[1], Path(__file__).parents[1]
    options = {**SMALL, "controls": ("dense", "random_reinit")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, kind, str(kill_at), json.dumps(options)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"},
    )
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def expected() -> Any:
    results = told(verdict(**{**SMALL, "controls": ("dense", "random_reinit")}))
    return json.loads(json.dumps(results))


def test_a_verdict_killed_in_the_middle_of_a_write_goes_on(tmp_path):
    """The line of the third training is written and not yet synced."""
    writes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _, real=os.fsync: writes.append(1) or real(_))
        verdict(run_dir=tmp_path / "counted", **{**SMALL, "controls": ("dense", "random_reinit")})
    assert in_a_process(tmp_path / "killed", "writes", len(writes) // 2) is None
    there = len(lines(tmp_path / "killed"))
    assert 2 <= there <= 4
    results = verdict(run_dir=tmp_path / "killed", **{**SMALL, "controls": ("dense", "random_reinit")})
    assert json.loads(json.dumps(told(results))) == expected()


@pytest.mark.slow
def test_a_verdict_killed_at_random_moments_ends_like_an_undisturbed_one(tmp_path):
    stream = random.Random(4)
    undisturbed = in_a_process(tmp_path / "undisturbed", "calls", -1)
    assert undisturbed is not None
    assert undisturbed["results"] == expected()
    kills = 0
    for _ in range(10):
        kills += in_a_process(tmp_path / "killed", "calls", stream.randrange(undisturbed["calls"] // 3)) is None
    assert kills >= 3
    last = in_a_process(tmp_path / "killed", "calls", -1)
    assert last is not None
    assert last["results"] == undisturbed["results"]
    assert len(lines(tmp_path / "killed")) == 6, "none was made twice"
