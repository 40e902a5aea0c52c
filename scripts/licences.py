"""The licences of everything that an installation brings: `make licences`.

    python scripts/licences.py

Reads what is installed: what the library requires, what its extras require, and what these require in turn. Tools
of development reach no user and are not looked at. It ends with 1 where a package is not known to let its users do
as they like.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, distribution
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOOLS = "dev"

# By the names of SPDX. All but MPL-2.0 are permissive; that one asks for nothing but changes to its own files.
ALLOWED = {
    *("0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "CNRI-Python", "HPND", "ISC"),
    *("LLVM-exception", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "NCSA", "PSF-2.0", "Unlicense", "Zlib"),
}

# What packages call them that do not use these names: the whole of the field License, or of a classifier.
_SPELLINGS = {
    "3-clause bsd license": "BSD-3-Clause",
    "apache 2.0": "Apache-2.0",
    "apache 2.0 license": "Apache-2.0",
    "apache license 2.0": "Apache-2.0",
    "apache license, version 2.0": "Apache-2.0",
    "apache license v2.0": "Apache-2.0",
    "apache software license": "Apache-2.0",
    "apache": "Apache-2.0",
    "apache-2": "Apache-2.0",
    "bsd": "BSD-3-Clause",
    "bsd license": "BSD-3-Clause",
    "bsd 3-clause": "BSD-3-Clause",
    "bsd 3-clause license": "BSD-3-Clause",
    "isc license (iscl)": "ISC",
    "mit license": "MIT",
    "mozilla public license 2.0 (mpl 2.0)": "MPL-2.0",
    "psf": "PSF-2.0",
    "python software foundation license": "PSF-2.0",
    "the unlicense (unlicense)": "Unlicense",
}


# A package that names none, and what the file of its licence says.
_READ = {"torchao": ("BSD-3-Clause", "Neither the name of the copyright holder nor the names of its contributors")}

# torch's builds for CUDA bring these along, under NVIDIA's own terms; so does no dependency of ours, and no code.
_WITH_TORCH = re.compile(r"(nvidia|cuda)-")


class Licence(NamedTuple):
    """What one package says of itself."""

    package: str
    version: str
    said: str
    allowed: bool


def needed(requirements: Iterable[Requirement], extra: str = "") -> dict[str, Distribution]:
    """Installed packages that the requirements name, and those that these require in turn.

    Raises:
        importlib.metadata.PackageNotFoundError: One of them is not installed.
    """
    found: dict[str, Distribution] = {}
    done: set[tuple[str, str]] = set()
    waiting = list(_wanted(requirements, extra))
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) not in done:
            done.add((name, extra))
            found[name] = distribution(name)
            waiting += _wanted(map(Requirement, found[name].requires or ()), extra)
    return dict(sorted(found.items()))


def _wanted(requirements: Iterable[Requirement], extra: str) -> Iterator[tuple[str, str]]:
    for one in requirements:
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            for its in ("", *one.extras):
                yield canonicalize_name(one.name), its


def is_allowed(said: str) -> bool:
    """Whether a licence, or an expression of several, asks no more of a user than the allowed ones do."""
    # Where there are parentheses, every licence has to be allowed, be it a choice or not.
    choices = [said] if "(" in said and said.lower() not in _SPELLINGS else re.split(r"\s+OR\s+", said)
    return any(all(map(_is_allowed_name, re.split(r"\s+(?:AND|OR|WITH)\s+|,\s*", one))) for one in choices)


def _is_allowed_name(name: str) -> bool:
    return _SPELLINGS.get(name.lower(), name.strip("()")) in ALLOWED


def said_by(package: Distribution) -> str:
    """What a package names: an expression of SPDX, else its classifiers, else a field, else what its file says."""
    about = package.metadata
    if expression := about.get("License-Expression"):
        return str(expression)
    kinds = [one.rpartition(" :: ")[2] for one in about.get_all("Classifier", []) if one.startswith("License :: ")]
    named = [kind for kind in kinds if kind != "OSI Approved"]
    if named:
        return ", ".join(named)
    if field := about.get("License"):
        return str(field).partition("\n")[0].strip()
    name, phrase = _READ.get(canonicalize_name(package.name), ("none named", ""))
    texts = (file.read_text() for file in package.files or () if file.name.startswith("LICENSE"))
    return name if any(phrase in " ".join(text.split()) for text in texts) else "none named"


def asked_for() -> list[Requirement]:
    """What pyproject.toml requires, and what its extras do, but for the tools of development."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [many for extra, many in project["optional-dependencies"].items() if extra != TOOLS]
    every = map(Requirement, [*project["dependencies"], *chain.from_iterable(extras)])
    return [one for one in every if canonicalize_name(one.name) != project["name"]]


def licences() -> list[Licence]:
    """Of all that the library and its extras require, in the order of their names."""
    return [
        Licence(name, package.version, said := said_by(package), is_allowed(said) or bool(_WITH_TORCH.match(name)))
        for name, package in needed(asked_for()).items()
    ]


def main() -> int:
    """Print the table."""
    found = licences()
    width = max(len(one.package) + len(one.version) for one in found) + 1
    for one in found:
        note = ", NVIDIA's terms, with torch's builds for CUDA" if _WITH_TORCH.match(one.package) else ""
        print(f"{f'{one.package} {one.version}':{width}}  {one.said}{note if one.allowed else '  <- NOT ALLOWED'}")
    refused = [one.package for one in found if not one.allowed]
    print(
        f"\n{len(found)} packages, {len(refused)} of them not allowed{': ' if refused else ''}{', '.join(refused)}"
    )
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
