"""`lottery-tickets plan`, and how a command says that memory is short."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from lottery_tickets import planning
from lottery_tickets.cli import app
from lottery_tickets.errors import MemoryPlanError
from lottery_tickets.planning import FreeMemory, _guard, plan_memory


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_shipped_name_and_the_memory_of_a_device():
    result = run("plan", "Qwen2.5-14B-config.json", "--operation", "early-bird", "--device-memory", "80GB")
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == "early-bird of Qwen2.5-14B-config.json in bfloat16 on cuda, 1 x 512 tokens at a time"
    assert any(line.split()[:3] == ["weights", "29.5", "GB"] for line in lines)
    assert any(line.endswith("80 GB  fits") for line in lines)


def test_json_is_the_plan():
    arguments = ("--batch-size", 2, "--context", 64, "--dtype", "float32", "--store", "disk", "--checkpointing")
    result = run("plan", "SmolLM2-135M", "--operation", "fisher", "--device-memory", "1GB", *arguments, "--json")
    (told,) = json.loads(result.stdout)["plans"]
    same = plan_memory(
        "SmolLM2-135M",
        "fisher",
        dtype="float32",
        batch_size=2,
        sequence_length=64,
        store="disk",
        gradient_checkpointing=True,
        device_memory="1GB",
    )
    assert told == json.loads(json.dumps(same.as_dict()))


def test_another_device():
    arguments = ("plan", "SmolLM2-135M", "--operation", "mask", "--device-memory", "1GB")
    assert " on cpu, " in run(*arguments, "--device", "cpu").stdout
    assert " on cuda, " in run(*arguments).stdout


def test_several_operations_and_their_largest_batches():
    result = run(
        "plan",
        *("SmolLM2-135M", "--device-memory", "8GB", "--batches"),
        *("--operation", "mask", "--operation", "early-bird", "--json"),
    )
    told = json.loads(result.stdout)
    assert [one["operation"] for one in told["plans"]] == ["mask", "early-bird"]
    assert set(told["largest_batches"]["mask"].values()) == {None}
    found = told["largest_batches"]["early-bird"]
    assert list(found) == ["128", "512", "2048", "8192"]
    assert list(found.values()) == sorted(found.values(), reverse=True)
    shown = run("plan", "SmolLM2-135M", "--device-memory", "8GB", "--batches", "--operation", "early-bird").stdout
    rows = [line.split() for line in shown.splitlines()]
    assert ["early-bird", *map(str, found.values())] in rows


def test_without_a_device_it_plans_for_what_is_free_here(monkeypatch):
    monkeypatch.setattr(planning, "free_memory", lambda: FreeMemory(10**9, "memory of this machine"))
    result = run("plan", "SmolLM2-135M", "--operation", "mask")
    assert "memory of this machine: 1.0 GB are free" in result.stderr
    assert " on cpu, " in result.stdout
    assert "1 GB  fits" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no-such-model", "--operation", "mask"), "no shipped configuration"),
        (("GPT-2", "--operation", "prune"), "operation is one of"),
        (("GPT-2", "--operation", "mask", "--device-memory", "much"), "amount of memory"),
        (("GPT-2", "--operation", "early-bird", "--optimizer", "lion"), "optimizer is one of"),
    ],
)
def test_wrong_questions_are_one_line(arguments, said):
    result = run("plan", *arguments)
    assert result.exit_code == 1
    assert said in result.stderr.splitlines()[-1]


def test_a_command_that_runs_short_shows_the_plan_and_can_be_told_to_go_on(monkeypatch, tmp_path):
    monkeypatch.setattr(_guard, "_SMALL", 0)
    monkeypatch.setattr(_guard, "free_memory", lambda _device: FreeMemory(0, "a made-up limit"))
    arguments = ("early-bird", "lenet-300-100", "--data", "mnist", "--epochs", 1, "-o", tmp_path / "run")
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    lines = result.stderr.splitlines()
    assert lines[0].startswith("error: early-bird needs")
    assert any(line.startswith("  weights") for line in lines)
    assert lines[-1] == "--no-memory-check goes on all the same."
    assert not list(Path(tmp_path).rglob("*.safetensors"))


def test_inside_unchecked_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(_guard, "_SMALL", 0)
    monkeypatch.setattr(_guard, "free_memory", lambda _device: FreeMemory(0, "a made-up limit"))
    with planning.unchecked():
        planning.refuse_if_too_large("mask", torch.nn.Linear(8, 8), check=True)
    with pytest.raises(MemoryPlanError, match="made-up"):
        planning.refuse_if_too_large("mask", torch.nn.Linear(8, 8), check=True)
