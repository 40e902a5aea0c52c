"""Options from a file, and back into one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lottery_tickets.vision import Images
from test_cli import COMMANDS, fail, run, succeed
from test_cli_imp import MODULE, QUICK, few_digits, one_thread, usage_error  # noqa: F401  # fixtures among them
from test_early_bird import TIMES

# Of which a run has none, or all, or one at the end of every epoch.
NEITHER = {
    *("network", "dataset", "model", "data", "batch-size", "validation", "output-fraction", "layer-fraction"),
    *("include", "exclude", "max-batch-size", "samples", "structure"),
    *("eval-every", "save-every", "rewind-step", "check-every-steps"),
}

IMP = ("imp", "--model", "mynet:make", "--data", "mynet:loaders", *QUICK)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a network of one's own."""
    (tmp_path / "mynet.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.delitem(sys.modules, "mynet", raising=False)
    return tmp_path


def printed(*arguments: object) -> dict[str, object]:
    result = run(*arguments, "--print-config")
    assert result.exit_code == 0, result.output
    return yaml.safe_load(result.stdout)


def written(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def test_what_is_printed_is_what_is_read(place: Path) -> None:
    typed = printed(*IMP, "--include", "a*", "--include", "b", "--plot", "-o", "run")
    assert typed["command"] == "imp"
    assert typed["include"] == ["a*", "b"]
    assert (typed["rounds"], typed["learning-rate"]) == (2, 0.05)
    assert (typed["plot"], typed["scope"], typed["first-seed"]) == (True, "global", 0)
    path = written("all.yaml", yaml.safe_dump(typed))
    assert printed("imp", "--config", path) == typed
    assert printed("imp", "--config", path, "--rounds", 7, "--include", "c") == {
        **typed,
        "rounds": 7,
        "include": ["c"],
    }
    assert not (place / "run").exists()


def test_names_may_have_dashes_or_not_and_be_short_for_others() -> None:
    base = "network: lenet\ndataset: mnist\noutput: run\n"
    for spelling in ("learning-rate: 0.5", "learning_rate: 0.5", "lr: 5e-1"):
        assert printed("imp", "--config", written("c.yaml", base + spelling))["learning-rate"] == 0.5
    assert printed("verdict", "--config", written("c.yaml", "run: r\nround: 3"))["round"] == 3


def test_arguments_and_lists_come_from_files_too() -> None:
    path = written("c.yaml", "model: m\ntickets: [a, b]\ntext: t\n")
    assert printed("evaluate", "--config", path)["tickets"] == ["a", "b"]
    assert printed("evaluate", "--config", path, "other", "c")["tickets"] == ["c"]
    assert printed("mask", "--config", written("c.yaml", "model: m\noutput: t\nsparsity: 0.5"))["sparsity"] == [
        0.5
    ]
    told = printed("mask", "--config", written("c.yaml", "model: m\noutput: t\ncriterion: fisher\nforce: yes"))
    assert (told["criterion"], told["force"]) == ("fisher", True)


def test_a_run_begins_from_a_file_and_has_all_of_it_in_its_folder() -> None:
    typed = succeed(*IMP, "-o", "typed")
    settings = yaml.safe_load(Path("typed/run.yaml").read_text(encoding="utf-8"))
    assert settings == printed(*IMP, "-o", "typed")
    filed = succeed("imp", "--config", "typed/run.yaml", "-o", "filed")
    assert [one["digest"] for one in typed["runs"].values()] == [one["digest"] for one in filed["runs"].values()]
    assert yaml.safe_load(Path("filed/run.yaml").read_text(encoding="utf-8")) == {**settings, "output": "filed"}
    succeed("stability", "filed", "--steps", "4", "--seeds", 1, "--points", 2)
    assert yaml.safe_load(Path("filed/stability/dense/run.yaml").read_text(encoding="utf-8"))["points"] == 2


def without_times(report: dict[str, Any], old: str, new: str) -> Any:
    """What does not hang on the clock, as if the run lay in another folder."""
    moved = json.loads(json.dumps(report).replace(old, new))
    return _timeless(moved)


def _timeless(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _timeless(one) for name, one in told.items() if name not in (*TIMES, "memory")}
    return [_timeless(one) for one in told] if isinstance(told, list) else told


MINE = [*IMP, "--seeds", 2, "-o", "mine"]
SHORT = ("imp", "lenet", "--dataset", "mnist", "--rounds", 1, "--target", 0.5, "--epochs", 1)
BIRD = ("early-bird", "lenet-300-100", "--data", "mnist", "--epochs", 2)
RUNS: dict[str, tuple[tuple[Any, ...], str, tuple[Any, ...], dict[str, Any]]] = {
    # What is typed, the folder of the run, what is typed to have it elsewhere, what options come to.
    "imp": (
        (*SHORT, "-o", "first"),
        "first",
        ("imp", "-o", "other"),
        {"batch-size": 60, "validation": 10, "learning-rate": 0.001, "prune-fraction": None},
    ),
    "imp-fraction": (
        (*SHORT[:4], "--rounds", 1, "--prune-fraction", 0.2, "--epochs", 1, "--optimizer", "sgd", "-o", "first"),
        "first",
        ("imp", "-o", "other"),
        {"target": None, "prune-fraction": 0.2, "learning-rate": 0.01},
    ),
    "early-bird": (
        (*BIRD, "--controls", "-o", "first"),
        "first",
        ("early-bird", "-o", "other"),
        {"sparsity": [0.5], "threshold": 0.1, "window": 5, "learning-rate": 0.01, "control-epochs": 2},
    ),
    "early-bird-ranks": (
        (*BIRD, "-s", 0.9, "-s", 0.3, "--criterion", "rank_correlation", "-o", "first"),
        "first",
        ("early-bird", "-o", "other"),
        {"sparsity": [0.9, 0.3], "threshold": 0.95, "window": 3, "control-epochs": None},
    ),
    "verdict": (
        ("verdict", "mine", "--controls", "dense,random_mask"),
        "mine/verdict/round-02",
        ("verdict", "copy"),
        {"run": "mine", "round": 2, "seeds": 2, "metric": "accuracy"},
    ),
    "stability": (
        ("stability", "mine", "--points", 2),
        "mine/stability/dense",
        ("stability", "mine", "-o", "other"),
        {"steps": "0,1,2,6", "seeds": 3, "output": "mine/stability/dense", "round": None},
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_file_of_a_run_has_what_its_options_came_to_and_makes_the_same_run(
    few_digits: Images,  # noqa: F811
    name: str,
) -> None:
    typed, folder, elsewhere, expected = RUNS[name]
    if "mine" in typed:
        succeed(*MINE)
        shutil.copytree("mine", "copy")
    told = succeed(*typed)
    path = Path(folder) / "run.yaml"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {key: settings[key] for key in expected} == expected
    others = {key for key, one in settings.items() if one is None} - expected.keys()
    assert others <= NEITHER, "only what is not used is null"
    assert without_times(succeed(typed[0], "--config", path), "", "") == without_times(told, "", "")
    again = succeed(*elsewhere, "--config", path)
    assert without_times(again, elsewhere[-1], folder if elsewhere[-1] == "other" else "mine") == without_times(
        told, "", ""
    )


def test_a_folder_keeps_the_options_of_its_own_run() -> None:
    succeed(*IMP, "-o", "run")
    before = Path("run/run.yaml").read_bytes()
    assert "epochs" in fail(*IMP, "-o", "run", "--epochs", 3)
    assert Path("run/run.yaml").read_bytes() == before
    assert "confidence" in fail("stability", "run", "--steps", "4", "--seeds", 1, "--confidence", 7)
    assert not Path("run/stability").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("rounds: [1", "--config"),
        ("- rounds", "not a list of"),
        ("command: mask\nrounds: 1", "another command than imp"),
        ("ruonds: 3", "no option 'ruonds'; did you mean rounds?"),
        ("config: other.yaml", "no option 'config'"),
        ("rounds: {a: 1}", "a single value is expected"),
        ("rounds: [1, 2]", "a single value is expected"),
        ("rounds: many", "as an integer"),
        ("rounds: 0", "greater than or equal to 1"),
    ],
)
def test_a_file_that_cannot_be_meant(text: str, problem: str) -> None:
    assert problem in usage_error(
        "imp", "lenet", "--dataset", "mnist", "-o", "run", "--config", written("c.yaml", text)
    )
    assert not Path("run").exists()


def test_a_file_that_is_not_there() -> None:
    assert "no.yaml: No such file" in usage_error("imp", "--config", "no.yaml")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_a_file(name: str) -> None:
    """An empty list of options changes nothing, whatever else is missing."""
    unknown = usage_error(name, "--config", written("c.yaml", "no-such-option: 1"))
    assert f"{name} has no option 'no-such-option'" in unknown


def test_results_say_what_they_were_made_with() -> None:
    report = succeed(*IMP, "-o", "run")
    assert json.loads(Path("run/results.json").read_text(encoding="utf-8")) == report
    assert report["schema"] == "lottery-tickets.imp/1"
    assert report["made_with"]["torch"]
