"""Documents say what was measured, and speak of what there is."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path

import pytest

import lottery_tickets

ROOT = Path(__file__).parents[1]
AROUND = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_measurements_are_those_of_the_result_files():
    page = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["page"]
    assert (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8") == page()


def test_what_is_concluded_of_the_criteria_is_what_was_measured():
    """The sentences of docs/importance-scores.md under "Which one", in their order."""
    results = json.loads((ROOT / "benchmarks" / "results" / "criteria.json").read_text(encoding="utf-8"))
    found = {
        (row["criterion"], row["spread"], row["target_sparsity"]): row["quality"]["perplexity"]
        for row in results["rows"]
    }

    def better(one: str, other: str, places: list[tuple[str, float | None]]) -> bool:
        return all(found[(one, *place)] < found[(other, *place)] for place in places)

    tensors = [(spread, sparsity) for spread in ("global", "layer") for sparsity in (0.3, 0.5)]
    rows, pattern = [("row", 0.3), ("row", 0.5)], [("2:4", None)]
    everywhere = tensors + pattern
    assert better("obd", "magnitude", everywhere)
    assert better("wanda", "magnitude", rows + pattern)
    assert all(found["wanda", "row", sparsity] < found["wanda", "global", sparsity] for sparsity in (0.3, 0.5))
    assert better("magnitude", "fisher", everywhere)
    assert better("magnitude", "grad_norm", everywhere)
    assert better("obd", "fisher", everywhere)
    assert better("taylor", "grad_norm", everywhere)
    for place in [("layer", 0.3), *pattern]:
        assert found[("taylor", *place)] < 1.1 * found[("obd", *place)]
    assert better("obd", "taylor", everywhere)
    assert better("obd", "snip", everywhere)
    assert better("magnitude+fisher", "magnitude", everywhere)
    assert better("magnitude+fisher", "fisher", everywhere)
    # On the page of measurements itself.
    assert better("magnitude", "grasp", everywhere)
    assert better("magnitude", "synflow", everywhere)


def test_what_is_concluded_of_the_optimizers_is_what_was_measured():
    """The sentences of docs/early-bird.md under "SGD or AdamW?", in their order."""
    results = json.loads((ROOT / "benchmarks/results/early_bird_optimizers.json").read_text(encoding="utf-8"))
    sgd, momentum, adamw = results["optimizers"]
    for network in results["summary"].values():
        between, orders, initial, accuracy = (
            {name: value["mean"] for name, value in network[part].items()}
            for part in ("between_optimizers", "between_orders", "with_initial", "accuracy")
        )
        for other in (sgd, momentum):
            assert between[f"{other} / {adamw}"] < min(orders[other], orders[adamw])
        assert abs(between[f"{sgd} / {momentum}"] - orders[momentum]) < 0.02
        assert initial[sgd] > initial[momentum] > initial[adamw]
        for name in (sgd, momentum, adamw):
            assert accuracy[name] >= accuracy["dense"]
            assert accuracy[name] > accuracy[f"random as {name}"]


@pytest.mark.parametrize("page", AROUND + PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_in_the_readme_and_in_the_navigation():
    readme, navigation = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "mkdocs.yml"))
    for page in PAGES:
        assert page.name in navigation
        assert page.name == "index.md" or f"docs/{page.name}" in readme


def test_every_promised_function_is_in_the_changelog():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in lottery_tickets.__all__ if name[0].islower() and f"`{name}`" not in changes] == []
