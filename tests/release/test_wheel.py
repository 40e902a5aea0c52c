"""The wheel, installed where there is nothing but what it requires.

Each test looks at one build and one environment; tests/bare.py makes them.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import typer
from packaging.utils import canonicalize_name
from trove_classifiers import classifiers

import bare
from lottery_tickets.cli import app

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).parent
PACKAGE = bare.ROOT / "src" / "lottery_tickets"
PROJECT = tomllib.loads((bare.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
INSTALLABLE = re.compile(r"pip install 'lottery-tickets\[(\w+)\]'")

# What needs an extra, by the name of the extra; everything else has to work without.
EXAMPLES = {
    "lottery_tickets.large_models.load_model": "No module named 'transformers'",
    "lottery_tickets.large_models.load_tokenizer": "No module named 'tokenizers'",
    "lottery_tickets.large_models.map_model": "No module named 'transformers'",
    "lottery_tickets.large_models.map_weights": "No module named 'transformers'",
    "lottery_tickets.large_models.resolve_model": "No module named 'transformers'",
    "lottery_tickets.reports.write_figures": "lottery-tickets[plot]",
    "lottery_tickets.reports.write_report": "lottery-tickets[report]",
    "lottery_tickets.structured.save_onnx": "lottery-tickets[onnx]",
}
COMMANDS = {
    "compare": "hf",
    "demo": "demo",
    "early-bird with a plot": "plot",
    "evaluate": "hf",
    "extract": "hf",
    "mask of the hub": "hf",
    "plan": "hf",
    "report": "report",
    "report with figures": "report",
    "score": "hf",
    "stability with a plot": "plot",
    "unit-mask": "hf",
}
USES = {
    "ONNX": "onnx",
    "a model": "hf",
    "a model in blocks": "hf",
    "a plan by a config": "hf",
    "a report": "report",
    "a ticket for the hub": "hf",
    "a ticket of the hub": "hf",
    "a tokenizer": "hf",
    "callbacks of Lightning": "lightning",
    "callbacks of transformers": "hf",
    "eight bits": "lean",
    "figures": "plot",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source distribution and the wheel."""
    return bare.build(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the bare environment."""
    return bare.make_environment(tmp_path_factory.mktemp("bare") / "environment", built[1])


@pytest.fixture(scope="module")
def commands(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What came of commands and of uses of extras."""
    return json.loads(bare.run(python, HERE / "inside_commands.py", cwd=tmp_path_factory.mktemp("commands")))


def modules_of(names: list[str]) -> set[str]:
    return {name.partition("lottery_tickets/")[2] for name in names if "lottery_tickets/" in name}


def test_the_wheel_holds_the_package_and_no_more(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
    expected = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "py.typed" in expected
    assert modules_of(names) == expected
    outside = {name.partition("/")[0] for name in names} - {"lottery_tickets"}
    assert outside == {f"lottery_tickets-{PROJECT['version']}.dist-info"}
    assert any(name.endswith("/licenses/LICENSE") for name in names)


@pytest.mark.skipif(not (bare.ROOT / ".git").exists(), reason="git tells what belongs to the tree")
def test_the_source_distribution_holds_the_tree(built):
    """All that is needed to build, test and read: files that git tracks, but for the gate's."""
    with tarfile.open(built[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = bare.run("git", "-C", bare.ROOT, "ls-files").split("\n")
    missing = {name for name in tracked if name and not name.startswith(".") and name not in names}
    assert missing == set()
    assert {name for name in names if "__pycache__" in name or name.startswith((".venv", "tickets/"))} == set()


def test_the_metadata_says_what_it_is(built):
    about = bare.metadata_of(built[1])
    assert (about.name, str(about.version)) == (PROJECT["name"], PROJECT["version"])
    assert about.license_expression == "Apache-2.0"
    assert about.description == (bare.ROOT / "README.md").read_text(encoding="utf-8")
    assert about.description_content_type == "text/markdown"
    assert set(about.classifiers or ()) <= classifiers
    assert set(about.provides_extra or ()) == set(PROJECT["optional-dependencies"])
    lowest = min(int(one.rpartition(".")[2]) for one in about.classifiers or () if " 3." in one)  # Python :: 3.10
    assert str(about.requires_python) == f">=3.{lowest}"


def test_nothing_else_is_installed_and_nothing_is_missing(python):
    installed = {one["name"] for one in json.loads(bare.pip(python, "list", "--format", "json"))}
    with_extras = {
        canonicalize_name(name) for name in ("transformers", "matplotlib", "onnx", "torchao", "greenlet")
    }
    assert not {canonicalize_name(name) for name in installed} & with_extras
    assert "No broken requirements found." in bare.pip(python, "check")


def test_importing_all_of_it_loads_little_beside_torch(python):
    loaded = json.loads(bare.run(python, HERE / "inside_imports.py"))
    ours = {name for name in loaded if "cython" not in name}
    assert ours <= {"lottery_tickets", "numpy", "psutil", "safetensors", "tqdm", "yaml"}


def test_every_public_name_works_without_an_extra_or_names_it(python, tmp_path):
    outcomes = json.loads(bare.run(python, HERE / "inside_examples.py", cwd=tmp_path))
    assert len(outcomes) > 60
    failed = {name: error for name, error in outcomes.items() if error}
    assert failed.keys() == EXAMPLES.keys(), failed
    assert all(EXAMPLES[name] in error for name, error in failed.items()), failed


def test_every_command_works_without_an_extra_or_names_it(commands):
    outcomes = commands["commands"]
    assert {name.partition(" ")[0] for name in outcomes} == set(typer.main.get_command(app).commands)
    failed = {name: error for name, error in outcomes.items() if error}
    assert failed.keys() == COMMANDS.keys(), failed
    assert {name: INSTALLABLE.findall(error) for name, error in failed.items()} == {
        name: [extra] for name, extra in COMMANDS.items()
    }


def test_every_extra_is_named_where_it_is_missing(commands):
    named = {name: INSTALLABLE.findall(error) for name, error in commands["uses"].items()}
    assert named == {name: [extra] for name, extra in USES.items()}
    assert set(USES.values()) | set(COMMANDS.values()) == set(PROJECT["optional-dependencies"]) - {"dev"}


def test_the_command_is_on_the_path_and_says_its_version(python):
    expected = f"lottery-tickets {PROJECT['version']}\n"
    assert bare.run(python.parent / "lottery-tickets", "--version") == expected
    assert bare.run(python, "-m", "lottery_tickets", "--version") == expected


def test_types_reach_the_user(python, tmp_path):
    """By what is installed mypy knows what the main functions return."""
    strict = ("--strict", "--config-file=", "--cache-dir", tmp_path, "--python-executable", python)
    assert "Success" in bare.run(sys.executable, "-m", "mypy", *strict, HERE / "typed_user.py", cwd=tmp_path)
