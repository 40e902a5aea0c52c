"""What users import: names that last, documented with an example, and an import that costs little."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import re
from collections import Counter
from importlib.metadata import metadata
from pathlib import Path

import pytest

import lottery_tickets
from lottery_tickets import errors
from processes import run_python

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(lottery_tickets.__path__, "lottery_tickets.")
    if not module.name.endswith("__main__")
)
PUBLIC = sorted(
    name
    for name in ("lottery_tickets", *MODULES)
    if not any(part.startswith("_") for part in name.split("."))
    and hasattr(importlib.import_module(name), "__all__")
)
WITHOUT_ALL = sorted(
    name for name in MODULES if name not in PUBLIC and not any(part.startswith("_") for part in name.split("."))
)
DOCUMENTED = sorted(lottery_tickets.__all__)


@pytest.mark.parametrize("module", PUBLIC)
def test_all_is_sorted_and_there(module):
    names = importlib.import_module(module).__all__
    assert list(names) == sorted(names, key=lambda name: (not name.isupper(), name[0].islower(), name))
    assert len(set(names)) == len(names)
    assert all(hasattr(importlib.import_module(module), name) for name in names)


def test_every_public_name_is_in_the_reference_once():
    """Each thing under one path of docs/api/, a promised one under the root's."""
    pages = (Path(__file__).parents[1] / "docs" / "api").glob("*.md")
    paths = [path for page in pages for path in re.findall(r"(?m)^::: (\S+)$", page.read_text(encoding="utf-8"))]
    told = Counter(identity(*path.rpartition(".")[::2]) for path in paths)
    modules = [*PUBLIC, *WITHOUT_ALL]
    public = {identity(module, name): f"{module}.{name}" for module in modules for name in names_of(module)}
    assert [public[one] for one in public.keys() - told.keys()] == []
    assert [one[0] for one, times in told.items() if times > 1] == []
    assert {f"lottery_tickets.{name}" for name in lottery_tickets.__all__} <= set(paths)


def names_of(module: str) -> list[str]:
    """What a module lists, or what is made in it."""
    things = vars(importlib.import_module(module))
    made = [
        name
        for name, thing in things.items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module
    ]
    return list(things.get("__all__", made))


def identity(module: str, name: str) -> tuple[str, int]:
    return name, id(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_public_name_is_documented(name):
    thing = getattr(lottery_tickets, name)
    doc = inspect.getdoc(thing)
    assert doc
    first = doc.split("\n")[0]
    assert first.endswith(".")
    if issubclass(thing, Exception) if isinstance(thing, type) else False:
        return
    assert "\n    >>> " in doc.partition("Example:")[2], "an Example that runs"
    if inspect.isfunction(thing):
        for argument in inspect.signature(thing).parameters:
            assert f"{argument}:" in doc, f"Args: {argument}"
        assert "Returns:" in doc or "Yields:" in doc or inspect.signature(thing).return_annotation == "None"
        assert "Raises:" in doc


@pytest.mark.parametrize("name", [name for name in vars(lottery_tickets.Mask) if not name.startswith("_")])
def test_every_method_of_mask_is_documented(name):
    assert inspect.getdoc(getattr(lottery_tickets.Mask, name))


@pytest.mark.parametrize("name", ["lottery_tickets", *MODULES])
def test_every_module_says_what_it_is(name):
    assert importlib.import_module(name).__doc__


def test_knobs_are_keyword_only():
    """Nouns may be given by position; what comes after them is named."""
    for name in DOCUMENTED:
        thing = getattr(lottery_tickets, name)
        if inspect.isfunction(thing):
            for parameter in inspect.signature(thing).parameters.values():
                assert (
                    parameter.name not in {"progress", "nan", "seed_of"}
                    or parameter.kind is parameter.KEYWORD_ONLY
                )


def test_every_exception_is_ours_and_a_built_in():
    for _, error in inspect.getmembers(errors, inspect.isclass):
        if issubclass(error, Warning):
            assert issubclass(error, UserWarning)
        elif error is not errors.LotteryTicketError:
            assert issubclass(error, errors.LotteryTicketError)
            assert issubclass(error, (ValueError, TypeError, RuntimeError, ImportError)), error


def test_the_package_is_typed():
    assert (Path(lottery_tickets.__file__).parent / "py.typed").is_file()


def test_the_package_says_its_version_and_licence():
    about = metadata("lottery-tickets")
    assert about["Version"] == "0.1.0"
    assert about["License-Expression"] == "Apache-2.0"


def test_importing_is_light():
    """numba, scipy and transformers cost seconds; whoever does not use them does not wait for them."""
    code = "import sys, json, lottery_tickets; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    loaded = set(json.loads(run_python(code)))
    heavy = {"numba", "llvmlite", "scipy", "transformers", "accelerate", "typer", "rich", "matplotlib", "pandas"}
    assert not loaded & heavy


def test_masks_and_files_need_no_compiler():
    code = (
        "import sys, torch; from lottery_tickets import Mask\n"
        "mask = Mask.from_tensors({'w': torch.ones(9)})\n"
        "_ = (mask & ~mask).kept, Mask.random_like(mask, 0).digest()\n"
        "print('numba' in sys.modules)"
    )
    assert run_python(code).strip() == "False"


def test_importing_changes_nothing_of_torchs():
    """Seeds, threads, precision and default types are the user's."""
    code = (
        "import torch; torch.manual_seed(7)\n"
        "def state(): return (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(),\n"
        "    torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(),\n"
        "    torch.is_grad_enabled(), torch.get_rng_state().sum().item())\n"
        "before = state()\n"
        "import lottery_tickets\n"
        "lottery_tickets.create_magnitude_mask({'w': torch.arange(9.)}, 0.5)\n"
        "print(state() == before)"
    )
    assert run_python(code).strip() == "True"
