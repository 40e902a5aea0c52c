"""What a release says of itself in several places is the same in all of them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def test_changes_are_kept_as_the_format_has_them():
    releases = re.findall(r"^## (.*)$", CHANGES, flags=re.M)
    dated = r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}"
    assert [one for one in releases if not re.fullmatch(rf"\[Unreleased\]|{dated}", one)] == []
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.*)$", CHANGES, flags=re.M)) <= kinds


def test_version_and_date_are_the_same_everywhere():
    version, date = re.search(r"^## \[(\d.*?)\] - (.*)$", CHANGES, flags=re.M).groups()
    assert version == PROJECT["version"] == CITATION["version"]
    assert date == str(CITATION["date-released"])
    assert CITATION["license"] == PROJECT["license"]
    minor = version.rpartition(".")[0]
    assert f"| {minor} | yes |" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")


def test_the_citation_has_what_its_format_asks_for():
    assert CITATION["cff-version"] == "1.2.0"
    for one in (CITATION, *CITATION["references"]):
        assert {"type", "title", "authors"} <= one.keys()
        assert all(
            "name" in author or {"given-names", "family-names"} <= author.keys() for author in one["authors"]
        )
    assert CITATION["message"]
    page = (ROOT / "docs" / "citing.md").read_text(encoding="utf-8")
    assert f"title   = {{{CITATION['title']}}}" in page
    assert f"version = {{{CITATION['version']}}}" in page


def test_the_pythons_of_the_policy_are_those_of_the_classifiers():
    versions = sorted(int(one.rpartition(".")[2]) for one in PROJECT["classifiers"] if ":: Python :: 3." in one)
    assert versions == list(range(versions[0], versions[-1] + 1))
    assert PROJECT["requires-python"] == f">=3.{versions[0]}"
    policy = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    assert f"| 3.{versions[0]} to 3.{versions[-1]}, on Linux |" in policy
    assert f"on Python 3.{versions[0]} with the lowest" in policy


def test_importing_costs_less_than_torch_and_a_second_and_a_half():
    """As measured by `benchmarks/import_time.py` in fresh processes, and nothing heavy is loaded."""
    results = json.loads((ROOT / "benchmarks/results/import_time.json").read_text(encoding="utf-8"))
    assert len(results["rows"]) == 4
    assert all(row["median_seconds"] < min(1.5, results["torch_seconds"]) for row in results["rows"])
    assert all(row["heavy"] == [] for row in results["rows"])
