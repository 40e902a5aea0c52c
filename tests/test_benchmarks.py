"""Benchmarks: none is forgotten where all of them run and are told of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from _tables.quick import TABLES
from run_all import BENCHMARKS

FOLDER = Path(__file__).parents[1] / "benchmarks"


def test_every_benchmark_runs_with_the_others():
    scripts = {path.stem for path in FOLDER.glob("*.py") if "benchmark_parser(__doc__" in path.read_text()}
    assert scripts == set(BENCHMARKS)


def test_every_benchmark_is_on_the_quick_page():
    found = json.loads((FOLDER / "results" / "run_all.json").read_text(encoding="utf-8"))
    assert list(found["benchmarks"]) == list(BENCHMARKS) == list(TABLES)


def run(name: str, *options: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / f"{name}.py"), *options]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)


def test_the_runner_gathers_what_a_benchmark_found(tmp_path):
    target = tmp_path / "found.json"
    done = run("run_all", "--only", "early_bird_check", "--json", str(target), tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(target.read_text())
    assert found["machine"]["versions"]["torch"]
    assert found["benchmarks"]["early_bird_check"]["results"]["weights"] == 784 * 1024 + 1024 * 10


def test_a_benchmark_that_fails_is_named_and_left_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # no data of ours there
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    target = tmp_path / "found.json"
    done = run("run_all", "--only", "early_bird_check", "--json", str(target), tmp_path=tmp_path)
    assert done.returncode == 1
    assert "failed: early_bird_check" in done.stderr
    assert json.loads(target.read_text())["benchmarks"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_quick_form_runs_and_is_shown(name, tmp_path):
    done = run(name, "--quick", "--results", str(tmp_path), tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / f"{name}.json").read_text())
    heading, tables = TABLES[name]
    assert heading
    assert all("|" in table(results) for table in tables)
