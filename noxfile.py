"""The wheel and the core of the suite on other Pythons, and on the lowest versions that pyproject.toml allows.

    make pythons    # every Python of the classifiers that is to be had here
    make floors     # the lowest Python, and of each dependency the lowest version

Both install from the package index what a user would get there, and not what constraints.txt says.
"""

from __future__ import annotations

import os
import shutil
import subprocess

import nox

PROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PROJECT)
EXTRAS = "demo,lean,lightning,onnx,plot,report"
# What the tests of CORE use beside the library and its extras.
TOOLS = (
    *("pytest", "pytest-cov", "pytest-xdist", "hypothesis", "sybil", "peft", "tensorboardX", "pexpect"),
    *("playwright", "axe-playwright-python", "build", "hatchling", "packaging", "pip", "tomli", "mypy"),
)
# Without the guides, and without what takes long and hangs on no version: kills, worlds of ranks, the benchmarks.
CORE = (
    *("tests/masks", "tests/sparsity", "tests/detection", "tests/structured", "tests/training", "tests/runs"),
    *("tests/iterative", "tests/large_models", "tests/planning", "tests/integrations", "tests/reports"),
    *("tests/test_public_surface.py", "tests/test_cli.py", "tests/test_evaluation.py", "tests/test_overlap.py"),
)
QUICKLY = ("--quiet", "--numprocesses", "2", "--dist", "loadfile")

if shutil.which("pyenv"):  # its commands python3.10 and the like answer only for versions that are asked for
    bare = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True, check=True).stdout
    os.environ["PYENV_VERSION"] = ":".join(bare.split())

nox.options.default_venv_backend = "uv"
nox.options.download_python = "never"
nox.options.sessions = ["pythons", "floors"]


@nox.session(python=PYTHONS)
def pythons(session: nox.Session) -> None:
    """The newest version of everything, on one Python: the wheel in a bare environment, and the suite's core."""
    session.install(f".[{EXTRAS}]", *TOOLS)
    session.run("pytest", *QUICKLY, "tests/release", *CORE, *session.posargs)


@nox.session(python=PYTHONS[0])
def floors(session: nox.Session) -> None:
    """The lowest version of each dependency, on the lowest Python: the core of the suite."""
    session.install("--resolution", "lowest-direct", f".[{EXTRAS}]")
    session.install(*TOOLS)
    session.run("pytest", *QUICKLY, *CORE, *session.posargs)
