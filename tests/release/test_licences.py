"""Whoever installs the library may do as they like with all that comes along."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "licences.py"))


def test_every_package_that_users_get_is_allowed():
    found = {one.package: one for one in SCRIPT["licences"]()}
    assert [one for one in found.values() if not one.allowed] == []
    # Of what is required, of what an extra of an extra brings, and of what these require.
    assert {"torch", "numba", "llvmlite", "gguf", "transformers", "vl-convert-python", "torchao"} <= found.keys()
    assert not {"pytest", "mypy", "playwright"} & found.keys()


@pytest.mark.parametrize(
    "said",
    [
        "MIT",
        "BSD License",
        "Apache-2.0 WITH LLVM-exception AND MIT",
        "GPL-3.0-only OR MIT",
        "(MIT OR Apache-2.0) AND BSD-3-Clause",
        "The Unlicense (Unlicense)",
        "MIT License, BSD License",
    ],
)
def test_permissive_licences_are_allowed(said):
    assert SCRIPT["is_allowed"](said)


@pytest.mark.parametrize(
    "said",
    [
        "none named",
        "",
        "GPL-3.0-only",
        "GNU Affero General Public License v3",
        "MIT AND GPL-2.0-only",
        "GPL-3.0-only OR MIT AND AGPL-3.0-only",
        "(MIT OR GPL-3.0-only) AND AGPL-3.0-only",
        "(MIT OR GPL-3.0-only)",
        "MIT License, GNU General Public License v3 (GPLv3)",
        "Other/Proprietary License",
    ],
)
def test_others_are_not(said):
    assert not SCRIPT["is_allowed"](said)
