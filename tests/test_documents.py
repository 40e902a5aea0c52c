"""Documents say what was measured, and speak of what there is."""

from __future__ import annotations

import json
import re
import runpy
import statistics
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import pytest

import lottery_tickets

ROOT = Path(__file__).parents[1]
AROUND = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def test_measurements_are_those_of_the_result_files():
    pages = runpy.run_path(str(ROOT / "benchmarks" / "tables.py"))["pages"]()
    assert {path.name for path in pages} >= {"measurements.md", "deployment.md"}
    for path, text in pages.items():
        assert path.read_text(encoding="utf-8") == text


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


def test_what_is_concluded_of_winning_tickets_is_what_was_measured():
    """The sentences of docs/reproduction.md under "Winning tickets", in their order; means over seeds."""
    results = json.loads((ROOT / "benchmarks/results/reproduce.json").read_text(encoding="utf-8"))["lenet"]
    assert len(results["seeds"]) >= 3
    assert (results["settings"]["epochs"], results["settings"]["eval_every_steps"]) == (8, 250)
    steps, accuracy, density = defaultdict(dict), defaultdict(dict), {}
    for number in range(results["settings"]["rounds"] + 1):
        for kind in ("ticket", "random re-initialisation", "random mask"):
            mine = [
                one
                for unit in results["seeds"]
                for one in unit["networks"]
                if one["kind"] == kind and one["round"] == number
            ]
            if mine:
                assert {one["steps"] for one in mine} == {7336}
                density[number] = mine[0]["density"]
                steps[kind][number] = statistics.fmean(one["early_stopping_step"] for one in mine)
                accuracy[kind][number] = statistics.fmean(one["early_stopping_test_accuracy"] for one in mine)
    ticket, again, mask = accuracy["ticket"], accuracy["random re-initialisation"], accuracy["random mask"]
    dense, looked_at = ticket[0], list(again)
    assert [round(100 * density[number], 1) for number in (3, 4, 6, 15, 18)] == [51.3, 41.1, 26.3, 3.6, 1.9]
    # As in the paper.
    assert all(steps["ticket"][number] < steps["ticket"][0] for number in range(4, 16))
    for number in looked_at:
        assert steps["ticket"][number] < min(steps[kind][number] for kind in steps if kind != "ticket")
    assert all(ticket[number] > dense for number in range(1, 19))
    assert all(ticket[number] > max(again[number], mask[number]) for number in looked_at if number >= 6)
    leads = [ticket[number] - max(again[number], mask[number]) for number in looked_at]
    assert leads == sorted(leads)
    assert leads[-1] > 0.02
    for control in (again, mask):
        few = [control[number] for number in looked_at if number >= 6]
        assert few == sorted(few, reverse=True)
        assert max(control[15], control[18]) < dense < min(control[3], control[6])
    assert again[15] > mask[15]
    assert again[18] > mask[18]
    assert steps["ticket"][18] > steps["ticket"][0]
    # Not as in the paper.
    assert ticket[18] > dense
    assert ticket[3] <= mask[3]
    assert min(steps["ticket"][1], steps["ticket"][2]) > steps["ticket"][0]


def test_what_is_concluded_of_rewinding_is_what_was_measured():
    """The sentences of docs/reproduction.md under "Where to rewind to"."""
    results = json.loads((ROOT / "benchmarks/results/reproduce.json").read_text(encoding="utf-8"))["cnn"]
    settings = results["settings"]
    assert (settings["training_images"], settings["rounds"], settings["prune_fraction"]) == (6000, 4, 0.5)

    def barrier(kind: str, step: int) -> float:
        pairs = [one for unit in results["seeds"] for one in unit["instability"][kind]]
        return statistics.fmean(one["error_barrier"] for one in pairs if one["rewind_step"] == step)

    def accuracy(step: int, number: int) -> float:
        mine = [one for unit in results["seeds"] for one in unit["networks"] if one["rewind_step"] == step]
        return statistics.fmean(one["test_accuracy"] for one in mine if one["round"] == number)

    first, second = settings["rewind_steps"]
    assert barrier("dense", 0) > 2 * max(barrier("dense", step) for step in (40, 120))
    assert barrier("dense", 0) < 0.02
    assert all(accuracy(first, number) > accuracy(first, 0) for number in range(1, 5))
    assert max(barrier("ticket", step) for step in (first, second)) < 0.02
    assert all(accuracy(first, number) >= accuracy(second, number) for number in range(1, 5))
    assert settings["epochs"] == 3
    assert (second, settings["epochs"] * settings["training_images"] // settings["batch_size"]) == (40, 300)


def test_figures_are_drawn_from_the_results():
    """Each carries a digest of what it was drawn from."""
    figures = runpy.run_path(str(ROOT / "benchmarks" / "figures.py"))
    results = json.loads((ROOT / "benchmarks/results/reproduce.json").read_text(encoding="utf-8"))
    for name in figures["FIGURES"]:
        drawn = (ROOT / "docs" / "figures" / f"reproduction-{name}.svg").read_text(encoding="utf-8")
        assert figures["digest"](results[name]) in drawn
    for name in figures["WHOLE"]:
        drawn = (ROOT / "docs" / "figures" / f"{name.replace('_', '-')}.svg").read_text(encoding="utf-8")
        assert figures["digest"](figures["told_of"](name)) in drawn


@pytest.mark.parametrize("page", AROUND + PAGES, ids=lambda page: page.name)
def test_links_between_files_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_page_is_in_the_readme_and_in_the_navigation():
    readme, navigation = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "mkdocs.yml"))
    for page in PAGES:
        assert page.name in navigation
        assert page.name == "README.md" or f"docs/{page.name}" in readme


def test_every_promised_function_is_in_the_changelog():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert [name for name in lottery_tickets.__all__ if name[0].islower() and f"`{name}`" not in changes] == []


def test_what_is_to_be_cited_is_there():
    """Every key of docs/citing.md has its entry, and the library's has its version."""
    page = (ROOT / "docs/citing.md").read_text(encoding="utf-8")
    keys = re.findall(r"`(\w+\d{4}\w+)`", page)
    entries = re.findall(r"(?m)^@\w+\{(\w+),$", page)
    assert len(keys) > 20
    assert set(keys) == {entry for entry in entries if entry != "lottery_tickets"}
    assert len(entries) == len(set(entries))
    assert f"version = {{{version('lottery-tickets')}}}" in page


def test_what_is_concluded_of_channels_is_what_was_measured():
    """The sentence at the end of docs/structured.md."""
    rows = json.loads((ROOT / "benchmarks/results/early_bird_channels.json").read_text(encoding="utf-8"))["rows"]
    shares = ("0.3", "0.5", "0.7")
    birds, random = ([rows[f"{name} {share}"] for share in shares] for name in ("early bird", "random channels"))
    assert all(bird["operations_ratio"] < 0.55 and bird["time_ratio"] < 1 for bird in birds)
    assert [bird["accuracy"] for bird in birds] == sorted((bird["accuracy"] for bird in birds), reverse=True)
    for bird, other in zip(birds, random, strict=True):
        (low, high), (other_low, other_high) = bird["accuracy_interval"], other["accuracy_interval"]
        assert max(low, other_low) <= min(high, other_high)


def test_what_is_concluded_of_deployment_is_what_was_measured():
    """The sentences of docs/deployment.md under its tables, in their order."""
    results, structured = (
        json.loads((ROOT / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
        for name in ("deployment", "structured")
    )
    disk, held = results["disk"], results["weight_bytes"]
    times = {
        count: {name: min(values) for name, values in runs.items()} for count, runs in results["seconds"].items()
    }
    prompt, one = times["128"], times["1"]
    eight, onnx = "eight-bit weights, ONNX Runtime", "0.9, zeros in place, ONNX Runtime"
    for ticket in ("0.5", "0.9", "2:4"):
        forms = disk[ticket]
        assert forms["safetensors"] == disk["dense"]["safetensors"]
        assert forms["ticket"] < forms["kept values and ticket, zstd"] < forms["gzip"] < forms["safetensors"]
        assert forms["gzip"] < forms["kept values and ticket"]
    for run in times.values():
        assert 0.8 < run["0.9, zeros in place"] / run["dense"] < 1.25
        assert run["0.9, CSR"] < run["dense"]
        assert run[onnx] < run["0.9, CSR"]
        assert run[eight] < run[onnx]
    assert held["0.9, zeros in place"] == held["dense"]
    assert 0.9 < held["0.5, CSR"] / held["dense"] < 1.1
    assert prompt["0.5, CSR"] > prompt["dense"]
    assert one["0.5, CSR"] > 0.8 * one["dense"]
    assert max(held["0.9, CSR"], held[eight]) < held["dense"] / 2
    assert max(structured["ratios"]["PyTorch"], structured["ratios"]["ONNX Runtime"]) < 0.8
