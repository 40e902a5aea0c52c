"""The wheel, and a virtual environment that has it and what it requires, and nothing else.

What it requires is linked, file by file as its installer listed them, from the environment that the suite runs in:
no download and no second gigabyte, and the same bytes. The wheel itself is installed by pip.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import Distribution
from pathlib import Path

from packaging.metadata import Metadata

ROOT = Path(__file__).parents[1]
needed = runpy.run_path(str(ROOT / "scripts" / "licences.py"))["needed"]


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution of this tree, and the wheel that is built from it."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


def metadata_of(wheel: Path) -> Metadata:
    """What it says of itself; names and values are checked against the standard."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Metadata.from_email(archive.read(name), validate=True)


def make_environment(folder: Path, wheel: Path) -> Path:
    """Its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    for package in needed(metadata_of(wheel).requires_dist).values():
        _link(package, packages)
    pip(python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    return python


def pip(python: Path, *arguments: object) -> str:
    """What pip says that works on the environment of this interpreter, which has none of its own."""
    return run(sys.executable, "-m", "pip", "--python", python, *arguments)


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints that must succeed, and that sees nothing of this tree."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key not in hidden},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _link(package: Distribution, packages: Path) -> None:
    for file in package.files or ():
        target = packages / file
        if ".." not in file.parts:  # commands, which name the interpreter that they were installed for
            target.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(Path(str(package.locate_file(file))), target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)
