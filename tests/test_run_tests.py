"""Parts of the suite by name: nothing is in none, and what is asked for is what runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from run_tests import MODULES, ROOT, files_of


def test_every_test_file_belongs_to_a_module():
    files = set((ROOT / "tests").rglob("test_*.py"))
    assert files - {path for module in MODULES for path in files_of(module)} == set()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_files(module):
    assert files_of(module)


def test_a_module_runs_from_anywhere(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "tests" / "run_tests.py"),
        "--module",
        "overlap",
        "--failfast",
        "--verbose",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "test_overlap.py::" in done.stdout
    assert "test_mask.py" not in done.stdout


def test_an_unknown_module_is_refused_with_the_known_ones(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "run_tests.py"), "--module", "ticket"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "early_bird" in done.stderr
