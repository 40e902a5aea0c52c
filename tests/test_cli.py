"""The command line: what it prints, what it writes, how it fails."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import lottery_tickets
from lottery_tickets import (
    Mask,
    apply_mask,
    compute_lottery_ticket_quality,
    create_importance_mask,
    create_magnitude_mask,
    importance_scoring,
)
from lottery_tickets._score_files import read_scores, write_scores
from lottery_tickets.cli import app
from lottery_tickets.cli._calibration import Excerpt, kept_apart
from lottery_tickets.cli._criteria import CRITERIA, criterion_of
from lottery_tickets.cli._meter import metered
from lottery_tickets.cli._windows import text_windows
from lottery_tickets.errors import CheckpointError, EvaluationError
from lottery_tickets.large_models import _weights, compute_weights_digest, load_tokenizer
from schemas import check_schema

WORDS = [f"w{index}" for index in range(60)]
COMMANDS = (
    "mask",
    "score",
    "compare",
    "early-bird",
    "imp",
    "verdict",
    "stability",
    "evaluate",
    "overlap",
    "inspect",
    "apply",
    "unit-mask",
    "extract",
    "plan",
    "report",
    "demo",
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def succeed(*arguments: object) -> Any:
    """What the command prints with --json, which must be all of stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    check_schema(str(arguments[0]), report)
    return report


def fail(*arguments: object) -> str:
    """The one line that a failing command prints."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert result.stderr.startswith("error: "), result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in two shards or more, with a tokenizer of words that puts <s> before a text."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="8KB")
    words = Tokenizer(models.WordLevel({"<s>": 0, "?": 1} | {word: 2 + n for n, word in enumerate(WORDS)}, "?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "words.txt"
    draws = torch.randint(len(WORDS), (500,), generator=torch.Generator().manual_seed(1))
    path.write_text(" ".join(WORDS[draw] for draw in draws), encoding="utf-8")
    return path


@pytest.fixture
def tickets(model: Path, tmp_path: Path) -> list[Path]:
    """Tickets of sparsity 0.3 and 0.6."""
    drawn = succeed("mask", model, "-s", 0.3, "-s", 0.6, "-o", tmp_path / "tickets")
    return [Path(ticket["path"]) for ticket in drawn["tickets"]]


def load(folder: Path, dtype: torch.dtype | str = "auto") -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


# --- mask ---


def test_mask_writes_the_masks_of_the_library(model: Path, tmp_path: Path) -> None:
    report = succeed("mask", model, "--sparsity", "0.5", "--sparsity", "0.9", "-o", tmp_path / "new" / "tickets")
    expected = create_magnitude_mask(load(model), [0.5, 0.9])
    names = ["magnitude-0.5.safetensors", "magnitude-0.9.safetensors"]
    assert sorted(path.name for path in (tmp_path / "new" / "tickets").iterdir()) == names
    for name, mask, described in zip(names, expected, report["tickets"], strict=True):
        path = tmp_path / "new" / "tickets" / name
        ticket = Mask.load(path)
        assert ticket == mask
        assert ticket.metadata == {
            "base_model": "tiny",
            "weights_digest": compute_weights_digest(model),
            "criterion": "magnitude",
            "scope": "global",
            "dtype": "auto",
            "target_sparsity": name.removeprefix("magnitude-").removesuffix(".safetensors"),
        }
        assert described["digest"] == mask.digest()
        assert described["removed"] == mask.numel - mask.kept
        assert described["bytes"] == path.stat().st_size


def test_mask_passes_its_choices_on(model: Path, tmp_path: Path) -> None:
    choices = ["--include", "*.embed_tokens.weight", "--exclude", "*.mlp.*", "--exclude", "lm_head.weight"]
    floors = ["--min-density", "0.2", "--dtype", "float32"]
    succeed("mask", model, "-s", 0.5, "-o", tmp_path / "a", *choices, *floors)
    ticket = Mask.load(tmp_path / "a" / "magnitude-0.5.safetensors")
    assert ticket == create_magnitude_mask(
        load(model),
        0.5,
        include="*.embed_tokens.weight",
        exclude=["*.mlp.*", "lm_head.weight"],
        min_density=0.2,
    )
    assert json.loads(ticket.metadata["exclude"]) == ["*.mlp.*", "lm_head.weight"]
    assert ticket.metadata["min_density"] == "0.2"
    succeed("mask", model, "-s", 0.5, "-o", tmp_path / "b", "--scope", "layer")
    layerwise = Mask.load(tmp_path / "b" / "magnitude-0.5.safetensors")
    assert layerwise == create_magnitude_mask(load(model), 0.5, scope="layer")
    assert layerwise.metadata["scope"] == "layer"


def test_mask_replaces_only_by_force(model: Path, tickets: list[Path], tmp_path: Path) -> None:
    before = tickets[0].read_bytes()
    again = ["mask", model, "-s", 0.3, "-o", tmp_path / "tickets", "--scope", "layer"]
    assert "there already; --force replaces" in fail(*again)
    assert tickets[0].read_bytes() == before
    succeed(*again, "--force")
    assert Mask.load(tickets[0]).metadata["scope"] == "layer"


def test_a_collapsed_layer_is_a_line_on_stderr(model: Path, tmp_path: Path) -> None:
    result = run("mask", model, "-s", 0.999, "-o", tmp_path, "--json")
    assert result.exit_code == 0
    assert re.search(r"^warning: Layer collapse: .*$", result.stderr, re.M)
    json.loads(result.stdout)
    assert run("mask", model, "-s", 0.999, "-o", tmp_path, "--force", "--quiet").stderr == ""


# --- inspect ---


def test_inspect(tickets: list[Path]) -> None:
    mask = Mask.load(tickets[1])
    report = succeed("inspect", tickets[1])
    assert report["digest"] == mask.digest()
    assert (report["numel"], report["kept"], report["sparsity"]) == (mask.numel, mask.kept, mask.sparsity)
    assert report["metadata"] == mask.metadata
    assert {name: layer["sparsity"] for name, layer in report["layers"].items()} == mask.layer_sparsity()
    shown = run("inspect", tickets[1]).stdout
    for name, sparsity in mask.layer_sparsity().items():
        assert re.search(rf"{re.escape(name)} .* {sparsity:.4f} ", shown), name
    assert f"weights_digest: {mask.metadata['weights_digest']}" in shown


def test_inspect_counts_weights_that_a_checkpoint_should_not_have(
    model: Path, tickets: list[Path], tmp_path: Path
) -> None:
    mask = Mask.load(tickets[1])
    succeed("apply", model, tickets[1], "-o", tmp_path / "pruned")
    report = succeed("inspect", tickets[1], "--model", tmp_path / "pruned")
    expected = {"name": str(tmp_path / "pruned"), "valid": True, "not_zero": 0, "problems": []}
    assert report["model"] == expected
    shown = run("inspect", tickets[1], "--model", tmp_path / "pruned").stdout
    assert f"pruned: 0 of {mask.numel - mask.kept:,} pruned weights are not zero." in shown
    dense = run("inspect", tickets[1], "--model", model, "--json")
    assert dense.exit_code == 1
    report = json.loads(dense.stdout)
    loaded = load(model).state_dict()
    for name in mask:
        assert report["layers"][name]["not_zero"] == int((loaded[name][~mask[name]] != 0).sum())
    total = sum(layer["not_zero"] for layer in report["layers"].values())
    assert report["model"]["not_zero"] == total > 0
    assert not report["model"]["valid"]
    result = run("inspect", tickets[1], "--model", model)
    assert result.exit_code == 1
    assert f"{total:,} of {mask.numel - mask.kept:,} pruned weights are not zero; not pruned" in result.stdout
    assert "neither a folder here nor" in fail("inspect", tickets[1], "--model", "absent")


# --- apply ---


def test_apply_equals_apply_mask(model: Path, tickets: list[Path], tmp_path: Path) -> None:
    report = succeed("apply", model, tickets[1], "-o", tmp_path / "pruned")
    expected = load(model)
    apply_mask(expected, Mask.load(tickets[1]))
    ours, theirs = load(tmp_path / "pruned").state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name].view(torch.int16), theirs[name].view(torch.int16)) for name in theirs)
    assert len(report["shards"]) > 1
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == {path.name for path in model.iterdir()}


def test_apply_refuses_an_existing_folder(model: Path, tickets: list[Path], tmp_path: Path) -> None:
    assert "exists already" in fail("apply", model, tickets[0], "-o", tmp_path / "tickets")


@pytest.fixture
def tuned(model: Path, tmp_path: Path) -> Path:
    """The same model with other weights."""
    other = load(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    other.save_pretrained(tmp_path / "tuned")
    load_tokenizer(model).save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_tickets_of_other_weights_need_a_word(
    tuned: Path, tickets: list[Path], text: Path, tmp_path: Path
) -> None:
    apply = ["apply", tuned, tickets[0], "-o", tmp_path / "pruned"]
    evaluate = ["evaluate", tuned, tickets[0], "--text", text, "--context", 32]
    for arguments in (apply, evaluate):
        message = fail(*arguments)
        assert re.search(r"was drawn from the weights \w{12} of tiny; .*tuned holds \w{12}\.", message), message
        result = run(*arguments, "--other-weights")
        assert result.exit_code == 0, result.stderr
        assert "note: " in result.stderr


# --- evaluate ---


def test_evaluate_equals_the_library(model: Path, tickets: list[Path], text: Path) -> None:
    report = succeed("evaluate", model, *tickets, "--text", text, "--context", 32, "--dtype", "float32")
    windows = text_windows(load_tokenizer(model), text, 32)
    assert report["windows"] == len(windows) == 500 // 31
    assert list(report["tickets"]) == [str(path) for path in tickets]
    for path in tickets:
        expected = compute_lottery_ticket_quality(load(model, torch.float32), Mask.load(path), windows)
        assert report["tickets"][str(path)] == json.loads(json.dumps(expected))
    assert report["baseline"]["perplexity"] > 1


@pytest.mark.parametrize("more", [(), ("--hidden-states", "disk"), ("--dtype", "float32")])
def test_evaluate_from_disk_equals_that_in_memory(
    model: Path, tickets: list[Path], text: Path, more: tuple[str, ...]
) -> None:
    arguments = ["evaluate", model, *tickets, "--text", text, "--context", 32, "--max-windows", 3]
    expected = succeed(*arguments, *(more if "--dtype" in more else ()))
    found = succeed(*arguments, "--from-disk", *more)
    assert found["dtype"] == expected["dtype"]
    for ticket, quality in expected["tickets"].items():
        assert found["tickets"][ticket]["loss"] == pytest.approx(quality["loss"], rel=1e-5)
        assert found["tickets"][ticket]["baseline"]["loss"] == pytest.approx(quality["baseline"]["loss"], rel=1e-5)


def test_evaluate_shows_a_row_for_each_model(model: Path, tickets: list[Path], text: Path) -> None:
    shown = run("evaluate", model, *tickets, "--text", text, "--context", 32, "--max-windows", 3)
    assert shown.exit_code == 0, shown.stderr
    assert "3 windows of 32 tokens" in " ".join(shown.stdout.split())
    assert re.search(r"dense +0 +[\d.]+ +1 *\n +\[", shown.stdout), shown.stdout
    assert len(re.findall(r" 0\.[36]00 ", shown.stdout)) == 2, shown.stdout  # the sparsities
    assert "evaluating 3 models on 3 windows" in shown.stderr


def test_evaluate_on_one_window_has_no_interval(model: Path, tickets: list[Path], text: Path) -> None:
    arguments = ["evaluate", model, tickets[0], "--text", text, "--context", 32, "--max-windows", 1]
    assert succeed(*arguments)["tickets"][str(tickets[0])]["perplexity_interval"] is None
    assert run(*arguments).exit_code == 0


# --- Windows of a text ---


def test_windows_are_the_tokens_of_the_whole_text(model: Path, text: Path) -> None:
    tokenizer = load_tokenizer(model)
    tokens = tokenizer(text.read_text(), add_special_tokens=False).input_ids
    windows = text_windows(tokenizer, text, 50)
    assert all(window["input_ids"].shape == (1, 50) and window["input_ids"][0, 0] == 0 for window in windows)
    joined = [token for window in windows for token in window["input_ids"][0, 1:].tolist()]
    assert joined == tokens[: len(joined)]
    assert len(tokens) - len(joined) < 49


def test_some_windows_are_the_first_of_all(smollm2_tokenizer: Any, english_text: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(english_text[2_000_000:2_200_000], encoding="utf-8")
    everything = text_windows(smollm2_tokenizer, path, 128)
    for count in (1, 7):
        some = text_windows(smollm2_tokenizer, path, 128, count=count)
        assert len(some) == count
        for first, second in zip(some, everything[:count], strict=True):
            assert torch.equal(first["input_ids"], second["input_ids"])
    later = text_windows(smollm2_tokenizer, path, 128, count=1, start=1000)
    assert smollm2_tokenizer.decode(later[0]["input_ids"][0])[:40] == english_text[2_001_000:2_001_040]


def test_text_of_too_few_tokens_or_no_text(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("w1 w2 w3")
    with pytest.raises(EvaluationError, match=r"3 tokens after character 0, and one window takes 15"):
        text_windows(load_tokenizer(model), short, 16)
    short.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match="not UTF-8 text"):
        text_windows(load_tokenizer(model), short, 16)


# --- mask: where the removed weights lie ---


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        (["--scope", "row"], {"scope": "row"}),
        (["--allocation", "erk"], {"allocation": "erk"}),
        (["--allocation", "owl", "--scope", "row"], {"allocation": "owl", "scope": "row"}),
        (
            ["--allocation", "*.0.mlp.*=0.25", "--allocation", "*.q_proj.weight=0.125"],
            {"allocation": {"*.0.mlp.*": 0.25, "*.q_proj.weight": 0.125}},
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mask_spreads_as_the_library_does(
    model: Path, tmp_path: Path, options: list[str], arguments: dict[str, Any]
) -> None:
    succeed("mask", model, "-s", 0.5, "-o", tmp_path, *options)
    ticket = Mask.load(tmp_path / "magnitude-0.5.safetensors")
    assert ticket == create_magnitude_mask(load(model), 0.5, **arguments)
    assert ticket != create_magnitude_mask(load(model), 0.5)
    named = arguments.get("allocation")
    told = named if isinstance(named, str) or named is None else json.dumps(named)
    assert ticket.metadata.get("allocation") == told
    assert ticket.metadata["scope"] == arguments.get("scope", "global")


def test_mask_by_pattern(model: Path, tmp_path: Path) -> None:
    report = succeed("mask", model, "--pattern", "2:4", "-o", tmp_path)
    ticket = Mask.load(tmp_path / "magnitude-2of4.safetensors")
    assert ticket == create_magnitude_mask(load(model), None, pattern="2:4")
    assert (ticket.metadata["pattern"], ticket.metadata["target_sparsity"]) == ("2:4", "0.5")
    assert report["spread"] == "2:4"
    assert "7 divides" in fail("mask", model, "--pattern", "6:7", "-o", tmp_path)
    succeed("mask", model, "--pattern", "6:12", "--pattern-remainder", "dense", "-o", tmp_path)
    rest = Mask.load(tmp_path / "magnitude-6of12.safetensors")
    assert rest == create_magnitude_mask(load(model), None, pattern="6:12", pattern_remainder="dense")
    assert {0.0, 0.5} == set(rest.layer_sparsity().values())


# --- score, and mask by scores ---


@pytest.fixture(scope="module")
def scores(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fisher scores of 6 sequences of 16 tokens."""
    folder = tmp_path_factory.mktemp("scores")
    succeed("score", model, "--criterion", "fisher", "--data", text, *SHORT, "-o", folder)
    return folder / "fisher.safetensors"


SHORT = ["--samples", 6, "--context", 16, "--batch-size", 4]


def fisher(model: Path, text: Path) -> dict[str, torch.Tensor]:
    """What the library gives for the same sequences, one by one."""
    windows = text_windows(load_tokenizer(model), text, 16, count=6)
    return importance_scoring.compute_fisher_importance(load(model, torch.float32), windows, progress=False)


def test_score_writes_the_scores_of_the_library(model: Path, text: Path, scores: Path) -> None:
    found, metadata = read_scores(scores)
    expected = fisher(model, text)
    assert list(found) == sorted(expected)
    for name, score in expected.items():
        torch.testing.assert_close(found[name], score, rtol=1e-5, atol=0)
    assert metadata == {
        "base_model": "tiny",
        "weights_digest": compute_weights_digest(model),
        "criterion": "fisher",
        "computed_in": "float32",
        "calibration": "words.txt",
        "calibration_start": "0",
        "samples": "6",
        "context": "16",
        "batch_size": "4",
        "seed": "0",
    }
    assert "there already" in fail(
        "score", model, "--criterion", "fisher", "--data", text, *SHORT, "-o", scores.parent
    )


def test_wanda_from_disk_is_that_in_memory(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["score", model, "--criterion", "wanda", "--data", text, "--context", 32, "--samples", 6]
    succeed(*arguments, "-o", tmp_path / "memory")
    succeed(*arguments, "-o", tmp_path / "disk", "--from-disk")
    expected, described = read_scores(tmp_path / "memory" / "wanda.safetensors")
    found, said = read_scores(tmp_path / "disk" / "wanda.safetensors")
    assert said == described
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_sums_on_disk_are_the_file_of_scores(
    model: Path, text: Path, scores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["score", model, "--criterion", "fisher", "--data", text, *SHORT, "--store", "disk", "-o", tmp_path]
    report = succeed(*options)
    assert list(tmp_path.iterdir()) == [tmp_path / "fisher.safetensors"]
    (found, metadata), (expected, described) = read_scores(tmp_path / "fisher.safetensors"), read_scores(scores)
    assert metadata == described
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    layers = report["scores"][0]["layers"]
    assert {name: float(score.max()) for name, score in found.items()} == {
        name: layer["largest"] for name, layer in layers.items()
    }
    before = (tmp_path / "fisher.safetensors").read_bytes()

    def broken(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("lottery_tickets._score_files.label_scores", broken)
    assert "disk full" in fail(*options, "--force", "--quiet")
    assert list(tmp_path.iterdir()) == [tmp_path / "fisher.safetensors"]
    assert (tmp_path / "fisher.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("criterion", "options", "function", "arguments"),
    [
        ("taylor-squared", [], "taylor", {"order": "squared"}),
        ("fisher-true", ["--seed", 3], "fisher", {"kind": "true", "seed": 3}),
        ("fisher-batch", [], "fisher", {"kind": "batch"}),
        ("fisher", ["--gradient-clip", 0.5], "fisher", {"gradient_clip": 0.5}),
        ("obd", ["--chunk-size", 500, "--store", "device"], "obd", {}),
        ("snip", ["--checkpoint-activations"], "snip", {"checkpoint_activations": True}),
        (
            "magnitude+0.5fisher-true",
            ["--store", "disk", "--seed", 3],
            "hybrid",
            {"weights": {"magnitude": 1.0, "fisher": 0.5}, "options": {"fisher": {"kind": "true"}}, "seed": 3},
        ),
    ],
)
def test_score_passes_its_choices_on(
    *,
    model: Path,
    text: Path,
    tmp_path: Path,
    criterion: str,
    options: list[object],
    function: str,
    arguments: Any,
) -> None:
    succeed("score", model, "--criterion", criterion, "--data", text, *SHORT, *options, "-o", tmp_path, "--quiet")
    found, metadata = read_scores(tmp_path / f"{criterion}.safetensors")
    batches = Excerpt(text, 16, 6).batches(load_tokenizer(model), 4)
    compute = getattr(importance_scoring, f"compute_{function}_importance")
    expected = compute(load(model, torch.float32), batches, **arguments, progress=False)
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    assert metadata["criterion"] == criterion
    assert metadata.get("gradient_clip") == (
        str(arguments["gradient_clip"]) if "gradient_clip" in arguments else None
    )


def test_synflow_goes_in_as_many_rounds_as_it_is_told(model: Path, tmp_path: Path) -> None:
    succeed("score", model, "--criterion", "synflow", "--rounds", 2, "-o", tmp_path)
    found, metadata = read_scores(tmp_path / "synflow.safetensors")
    expected = importance_scoring.compute_synflow_importance(load(model, torch.float32), rounds=2, progress=False)
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    assert metadata["rounds"] == "2"


def test_mask_calibrates_from_where_it_is_told(model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--criterion", "wanda", "--calibration", text, *SHORT, "--calibration-start", 600]
    succeed("mask", model, *options, "-s", 0.5, "-o", tmp_path, "--quiet")
    windows = text_windows(load_tokenizer(model), text, 16, count=6, start=600)
    dense = load(model, torch.float32)
    ranks = importance_scoring.compute_wanda_importance(dense, windows, progress=False)
    ticket = Mask.load(tmp_path / "wanda-0.5.safetensors")
    assert ticket == create_importance_mask(ranks, 0.5, model=dense, scope="row", progress=False)
    assert ticket.metadata["calibration_start"] == "600"


@pytest.mark.filterwarnings("ignore:Layer collapse")
def test_mask_draws_from_saved_scores_what_it_draws_from_the_text(
    model: Path, text: Path, scores: Path, tmp_path: Path
) -> None:
    succeed("mask", model, "--scores", scores, "-s", 0.3, "-s", 0.6, "-o", tmp_path / "saved")
    options = ["--criterion", "fisher", "--calibration", text, *SHORT]
    succeed("mask", model, *options, "-s", 0.3, "-s", 0.6, "-o", tmp_path / "computed")
    expected = create_importance_mask(read_scores(scores)[0], [0.3, 0.6], model=load(model))
    for sparsity, mask in zip(("0.3", "0.6"), expected, strict=True):
        name = f"fisher-{sparsity}.safetensors"
        saved, computed = Mask.load(tmp_path / "saved" / name), Mask.load(tmp_path / "computed" / name)
        assert saved == mask == computed
        assert saved.metadata == computed.metadata
        assert saved.metadata["samples"] == "6"
        assert saved != create_magnitude_mask(load(model), float(sparsity))


def test_scores_go_with_patterns_and_allocations(model: Path, scores: Path, tmp_path: Path) -> None:
    ranks = read_scores(scores)[0]
    succeed("mask", model, "--scores", scores, "--pattern", "1:4", "-o", tmp_path)
    expected = create_importance_mask(ranks, None, pattern="1:4", model=load(model))
    assert Mask.load(tmp_path / "fisher-1of4.safetensors") == expected
    succeed("mask", model, "--scores", scores, "-s", 0.5, "--allocation", "lamp", "-o", tmp_path)
    expected = create_importance_mask(ranks, 0.5, allocation="lamp", model=load(model))
    assert Mask.load(tmp_path / "fisher-0.5.safetensors") == expected


def test_scores_of_other_weights_need_a_word(tuned: Path, scores: Path, tmp_path: Path) -> None:
    arguments = ["mask", tuned, "--scores", scores, "-s", 0.5, "-o", tmp_path / "drawn"]
    assert re.search(r"was drawn from the weights \w{12} of tiny; .*tuned holds \w{12}\.", fail(*arguments))
    succeed(*arguments, "--other-weights")


def test_scores_that_do_not_say_how_they_rank(model: Path, scores: Path, tmp_path: Path) -> None:
    path = tmp_path / "strange.safetensors"
    write_scores(path, read_scores(scores)[0], {"criterion": "luck"})
    assert "criterion 'luck' is not known here" in fail("mask", model, "--scores", path, "-s", 0.5, "-o", tmp_path)


def test_what_cannot_be_met_shows_before_scores_are_computed(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("scored")

    monkeypatch.setattr("lottery_tickets.cli._scoring.compute_scores", never)
    monkeypatch.setattr("lottery_tickets.cli._comparison.compute_scores", never)
    options = ["--criterion", "fisher", "--calibration", text, *SHORT, "-o", tmp_path / "x"]
    assert "1.5" in fail("mask", model, "-s", 1.5, *options)
    assert "7 divides" in fail("mask", model, "--pattern", "6:7", *options)
    comparing = ["compare", model, "--criteria", "fisher", "--text", text, *SHORT]
    assert "7 divides" in fail(*comparing, "--pattern", "6:7")
    assert "unexpected AssertionError: scored" in fail(*comparing)


@pytest.mark.parametrize("name", [*CRITERIA, "magnitude+0.5fisher", "taylor-squared+fisher-batch"])
def test_every_criterion_draws(model: Path, text: Path, tmp_path: Path, name: str) -> None:
    source = ["--calibration", text, *SHORT] if criterion_of(name).needs_text else []
    succeed("mask", model, "--criterion", name, *source, "-s", 0.5, "-o", tmp_path, "--quiet")
    ticket = Mask.load(tmp_path / f"{name}-0.5.safetensors")
    assert ticket.sparsity == pytest.approx(0.5, abs=1e-3)
    assert (ticket == create_magnitude_mask(load(model), 0.5)) == (name == "magnitude")
    assert ticket.metadata["criterion"] == name


@pytest.mark.filterwarnings("ignore:Layer collapse")
def test_wanda_compares_within_rows_unless_told(model: Path, text: Path, tmp_path: Path) -> None:
    windows = text_windows(load_tokenizer(model), text, 16, count=6)
    dense = load(model, torch.float32)
    ranks = importance_scoring.compute_wanda_importance(dense, windows, progress=False)
    options = ["mask", model, "--criterion", "wanda", "--calibration", text, *SHORT, "-s", 0.5, "--quiet"]
    for name, more, how in (
        ("own", [], {"scope": "row"}),
        ("global", ["--scope", "global"], {}),
        ("owl", ["--allocation", "owl"], {"allocation": "owl", "scope": "row"}),
        ("lamp", ["--allocation", "lamp"], {"allocation": "lamp"}),
    ):
        succeed(*options, *more, "-o", tmp_path / name)
        ticket = Mask.load(tmp_path / name / "wanda-0.5.safetensors")
        assert ticket == create_importance_mask(ranks, 0.5, model=dense, progress=False, **how), name
        assert ticket.metadata["scope"] == how.get("scope", "global")


# --- compare ---


@pytest.fixture
def compared(model: Path, text: Path) -> list[object]:
    """Arguments of a comparison that takes a second or two."""
    options = ["--max-windows", 4, "--calibration-context", 8, "--scope", "global", "--scope", "layer"]
    return ["compare", model, "--criteria", "magnitude,fisher", "--text", text, *SHORT, *options]


@pytest.mark.filterwarnings("ignore:Layer collapse")
def test_compare_equals_the_library(model: Path, text: Path, compared: list[object], tmp_path: Path) -> None:
    output = tmp_path / "comparison.json"
    report = succeed(*compared, "-s", 0.6, "--pattern", "2:4", "-o", output)
    assert json.loads(output.read_text()) == report
    tokenizer, start = load_tokenizer(model), len(text.read_text()) // 2
    test = text_windows(tokenizer, text, 16, count=4, start=start)
    calibration = text_windows(tokenizer, text, 8, count=6)
    dense = load(model, torch.float32)
    ranks = importance_scoring.compute_fisher_importance(dense, calibration, progress=False)
    spreads = [("global", 0.6), ("layer", 0.6), ("2:4", None)]
    assert [(row["spread"], row["target_sparsity"]) for row in report["rows"]] == spreads * 2
    assert [row["criterion"] for row in report["rows"]] == ["magnitude"] * 3 + ["fisher"] * 3
    for row in report["rows"]:
        how = {"pattern": "2:4"} if row["spread"] == "2:4" else {"scope": row["spread"]}
        scored = row["criterion"] == "fisher"
        mask = (
            create_importance_mask(ranks, row["target_sparsity"], model=dense, **how)
            if scored
            else create_magnitude_mask(dense, row["target_sparsity"], **how)
        )
        expected = compute_lottery_ticket_quality(dense, mask, test)
        assert row["quality"] == json.loads(json.dumps(expected))
        assert row["emptied"] == sum(kept == 0 for kept in mask.layer_kept().values())
        assert (row["seconds_scoring"] > 0) == scored
    assert report["dense"] == report["rows"][0]["quality"]["baseline"]


def test_compare_shows_a_row_for_each_ticket(compared: list[object]) -> None:
    shown = run(*compared, "-s", 0.3)
    assert shown.exit_code == 0, shown.stderr
    for criterion in ("magnitude", "fisher"):
        for scope in ("global", "layer"):
            assert re.search(rf"{criterion} +{scope} +0\.300 +[\d.]+ +[\d.]+ +[\d.]+ +\d+ MiB", shown.stdout)
    assert "fisher: scored in" in shown.stderr
    assert "Scores from 6 sequences of 8 tokens" in shown.stdout


def test_compare_spreads_as_the_criterion_calls_for(model: Path, text: Path) -> None:
    options = ["compare", model, "--criteria", "magnitude,wanda", "--text", text, *SHORT, "--max-windows", 2]

    def ways(*more: object) -> list[tuple[str, str, float | None]]:
        rows = succeed(*options, *more)["rows"]
        return [(row["criterion"], row["spread"], row["target_sparsity"]) for row in rows]

    assert ways("--pattern", "2:4") == [("magnitude", "2:4", None), ("wanda", "2:4", None)]
    assert ways("--pattern", "2:4", "-s", 0.25, "--allocation", "erk") == [
        ("magnitude", "erk", 0.25),
        ("magnitude", "2:4", None),
        ("wanda", "erk, row", 0.25),
        ("wanda", "2:4", None),
    ]
    assert ways("-s", 0.25, "-s", 0.25) == [("magnitude", "global", 0.25), ("wanda", "row", 0.25)]


def test_compare_keeps_what_it_measured_before_it_failed(
    compared: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise EvaluationError("no scores today")

    monkeypatch.setattr("lottery_tickets.cli._comparison.compute_scores", broken)
    assert "no scores today" in fail(*compared, "-s", 0.3, "-o", tmp_path / "some.json", "--quiet")
    rows = json.loads((tmp_path / "some.json").read_text())["rows"]
    assert [(row["criterion"], row["spread"]) for row in rows] == [("magnitude", "global"), ("magnitude", "layer")]


def test_calibration_and_test_text_do_not_overlap(model: Path, compared: list[object]) -> None:
    assert "both begin at character 100" in fail(*compared, "--start", 100, "--calibration-start", 100)
    short = fail(*compared, "--start", 100)
    assert re.search(r"\d sequences of 8 tokens after character 0 and before 100, .* --samples 6 asks for", short)
    both = succeed(*compared, "--start", 0, "--calibration-start", 200, "--max-windows", 400, "--quiet")
    assert both["windows"] < 200 // 15  # each window takes 15 words of two or three letters


def test_excerpts_of_one_file_end_where_the_next_begins(model: Path, text: Path, tmp_path: Path) -> None:
    tokenizer, words = load_tokenizer(model), text.read_text()
    calibration, test = kept_apart(Excerpt(text, 8, None), Excerpt(text, 8, None, start=300))
    used = [token for window in calibration.windows(tokenizer) for token in window["input_ids"][0, 1:].tolist()]
    assert used == tokenizer(words[:300], add_special_tokens=False).input_ids[: len(used)]
    assert test.stop is None
    test, calibration = kept_apart(test, calibration)  # the other way round
    assert (calibration.stop, test.stop) == (300, None)
    copy = tmp_path / "copy.txt"
    copy.write_text(words)
    assert kept_apart(Excerpt(copy, 8, None), Excerpt(text, 8, None))[0].stop is None
    link = tmp_path / "link.txt"
    link.symlink_to(text)
    assert kept_apart(Excerpt(link, 8, None), Excerpt(text, 8, None, start=9))[0].stop == 9


def test_a_plot_is_drawn(compared: list[object], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    succeed(*compared, "-s", 0.3, "-s", 0.6, "--plot", tmp_path / "c.svg")
    drawn = (tmp_path / "c.svg").read_text()
    assert drawn.startswith("<?xml")
    for label in ("dense", "magnitude", "fisher", "global", "layer", "tiny on words.txt"):
        assert f"<!-- {label} -->" in drawn
    assert "the suffix names the format, one of" in fail(*compared, "--plot", tmp_path / "c.txt")


def test_a_plot_without_matplotlib(compared: list[object], tmp_path: Path, without: Callable[[str], None]) -> None:
    without("matplotlib")
    without("matplotlib.figure")
    assert "pip install 'lottery-tickets[plot]'" in fail(*compared, "--plot", tmp_path / "c.svg")


def test_the_meter_sees_memory_that_is_gone_again() -> None:
    def work() -> int:
        return len(bytes(range(256)) * (1 << 18))  # 64 MiB

    size, cost = metered(work, torch.device("cpu"))
    if sys.platform != "linux":
        pytest.skip("only Linux tells")
    assert cost.host_bytes is not None
    assert 0.95 * size < cost.host_bytes < 1.5 * size
    _, nothing = metered(int, torch.device("cpu"))
    assert nothing.host_bytes is not None
    assert nothing.host_bytes < size / 4
    assert cost.device_bytes is None


# --- overlap ---


@pytest.mark.parametrize("method", ["jaccard", "dice", "overlap"])
def test_overlap_equals_the_library(tickets: list[Path], method: str) -> None:
    report = succeed("overlap", *tickets, "--method", method)
    first, second = (Mask.load(path) for path in tickets)
    expected = lottery_tickets.compute_ticket_overlap(first, second, method)
    assert {name: report[name] for name in expected} == expected
    assert report["summary"]["total_intersection"] == second.kept  # tickets of one counting are nested
    assert f"{report['overall_overlap']:.6f}" in run("overlap", *tickets, "--method", method).stdout


def test_overlap_of_tickets_that_differ_in_layers(tickets: list[Path], tmp_path: Path) -> None:
    mask = Mask.load(tickets[0])
    Mask.from_tensors({name: mask[name] for name in mask.names[1:]}).save(tmp_path / "part.safetensors")
    assert succeed("overlap", tickets[0], tmp_path / "part.safetensors")["skipped_layers"] == [mask.names[0]]
    assert mask.names[0] in fail("overlap", tickets[0], tmp_path / "part.safetensors", "--strict")


# --- demo ---


def test_demo(smollm2_folder: Path, english_text: str, tmp_path: Path) -> None:
    output = tmp_path / "tickets"
    arguments = ["demo", "-o", output, "--windows", 1, "-s", 0.3]
    report = succeed(*arguments)
    (row,) = report["tickets"]
    ticket = Mask.load(output / "magnitude-0.3.safetensors")
    assert ticket.metadata["weights_digest"] == compute_weights_digest(smollm2_folder)
    assert ticket.numel - ticket.kept == round(0.3 * ticket.numel) == round(0.3 * report["prunable_weights"])
    assert row["bytes"] <= ticket.numel / 8 + 64 * 1024
    assert row["ticket"]["perplexity"] < row["random"]["perplexity"] / 100
    assert report["dense"]["perplexity"] < row["ticket"]["perplexity"] < 3 * report["dense"]["perplexity"]
    assert row["random"]["sparsity"] == row["ticket"]["sparsity"] == ticket.sparsity


# --- Failing, helping ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("inspect absent.safetensors", "absent.safetensors"),
        ("inspect {folder}", "a folder, not a ticket file"),
        ("inspect {text}", "not a whole safetensors file"),
        ("inspect {model}/model-00001-of-00002.safetensors", "a ticket says 'lottery_tickets.mask'"),
        ("mask no/such-model -s 0.5 -o {folder}/x", "no/such-model is neither a folder here nor"),
        ("mask {folder} -s 0.5 -o {folder}/x", "neither model.safetensors nor"),
        ("mask {model} -s 1.5 -o {folder}/x", "1.5"),
        ("mask {model} -s 0.5 -o {folder}/x --include nothing*", "include='nothing*' matches no parameter"),
        ("mask {model} -s 0.5 -o {text}/x", "Not a directory"),
        ("evaluate {model} {ticket} --text absent.txt", "absent.txt: No such file or directory"),
        ("evaluate {model} {ticket} --text {text} --context 99", "made for at most 64 tokens"),
        ("evaluate {model} {ticket} --text {text} --context 32 --device nowhere", "--device nowhere"),
        ("apply {model} absent.safetensors -o {folder}/x", "absent.safetensors"),
        ("mask {model} --scores {ticket} -s 0.5 -o {folder}/x", "files of scores say 'lottery_tickets.scores'"),
        ("mask {model} --scores {folder} -s 0.5 -o {folder}/x", "a folder, not a file of scores"),
        ("mask {model} --scores {text} -s 0.5 -o {folder}/x", "not a whole safetensors file"),
        (
            "mask {model} --criterion fisher --calibration {text} --context 64 -s 0.5 -o {folder}/x",
            "--samples 128 asks for",
        ),
        (
            "mask {model} -s 0.5 --criterion grasp --allocation lamp --calibration {text} -o {folder}/x",
            "weighs scores as sizes",
        ),
        ("mask {model} -s 0.5 --allocation erk --scope layer -o {folder}/x", "contradict each other"),
        ("mask {model} -s 0.5 --allocation nothing*=0.5 -o {folder}/x", "nothing*"),
        ("mask {model} --pattern 4:2 -o {folder}/x", "4:2"),
        ("compare {model} --criteria magnitude --text absent.txt", "absent.txt: No such file or directory"),
    ],
)
def test_an_error_is_one_line(
    model: Path, text: Path, tickets: list[Path], tmp_path: Path, arguments: str, message: str
) -> None:
    places = {"model": model, "text": text, "ticket": tickets[0], "folder": tmp_path}
    assert message in fail(*shlex.split(arguments.format(**places)))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "inspect",
        "nonsense",
        "mask m -s much -o x",
        "mask m -s 0.5 -s 0.5 -o x",
        "mask m -s 0.5 -o x --scope middle",
        "evaluate m t.safetensors t.safetensors --text x",
        "evaluate m t.safetensors --text x --context 1",
        "evaluate m t.safetensors --text x --from-disk --device cuda",
        "evaluate m t.safetensors --text x --hidden-states disk",
        "score m --criterion fisher --data x -o o --from-disk",
        "overlap a b --method cosine",
        "demo --windows 0",
        "mask m -o x",
        "mask m -s 0.5 -s 0.6 --pattern 2:4 -o x",
        "mask m -s 0.5 --allocation most -o x",
        "mask m -s 0.5 --allocation erk --allocation lamp -o x",
        "mask m -s 0.5 --allocation a*=much -o x",
        "mask m -s 0.5 --criterion luck -o x",
        "mask m -s 0.5 --criterion fisher -o x",
        "mask m -s 0.5 --criterion fisher+luck --calibration x -o x",
        "mask m -s 0.5 --criterion fisher+grasp --calibration x -o x",
        "mask m -s 0.5 --criterion fisher+fisher --calibration x -o x",
        "mask m -s 0.5 --criterion .fisher+taylor --calibration x -o x",
        "mask m -s 0.5 --criterion 2fisher --calibration x -o x",
        "mask m -s 0.5 --calibration x -o x",
        "mask m -s 0.5 --scores x --criterion fisher -o x",
        "score m --criterion fisher -o x",
        "score m --criterion magnitude -o x",
        "compare m --criteria magnitude,luck --text x",
        "compare m --allocation a*=0.5 --text x",
        "compare m --criteria , --text x",
        "compare m --scope layer --pattern 2:4 --text x",
        "mask m -s 0.5 --criterion fisher+fisher-true --calibration x -o x",
        "mask m -s 0.5 --calibration-start 9 -o x",
        "mask m -s 0.5 --store disk -o x",
        "mask m -s 0.5 --criterion wanda --calibration x --chunk-size 9 -o x",
        "mask m -s 0.5 --criterion fisher --calibration x --rounds 9 -o x",
        "mask m -s 0.5 --scores x --gradient-clip 1 -o x",
        "mask m -s 0.5 --scores x --calibration-start 1 -o x",
        "score m --criterion wanda --data x --checkpoint-activations -o x",
        "score m --criterion fisher --data x --store tape -o x",
        "score m --criterion fisher --data x --store disk --chunk-size 9 -o x",
        "score m --criterion fisher --data x --chunk-size 0 -o x",
        "score m --criterion fisher --data x --gradient-clip 0 -o x",
        "score m --criterion fisher --data x --gradient-clip nan -o x",
        "score m --criterion fisher-batch --data x --gradient-clip 1 -o x",
        "score m --criterion synflow --rounds 0 -o x",
        "compare m --criteria magnitude,wanda --store device --text x",
        "compare m --criteria fisher,magnitude+fisher-batch --gradient-clip 1 --text x",
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: str) -> None:
    result = run(*arguments.split())
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    assert "Usage:" in result.stderr


def test_verbose_logs_to_stderr(tickets: list[Path]) -> None:
    result = run("inspect", tickets[0], "--verbose", "--json")
    assert "INFO lottery_tickets" in result.stderr
    json.loads(result.stdout)
    assert run("inspect", tickets[0]).stderr == ""


def test_debug_raises_what_went_wrong() -> None:
    result = run("inspect", "absent.safetensors", "--debug")
    assert isinstance(result.exception, FileNotFoundError)


def test_an_unexpected_error_says_so(tickets: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(path: Path) -> Mask:
        raise ZeroDivisionError(f"while reading\n{path}")

    monkeypatch.setattr(Mask, "load", broken)
    assert fail("inspect", tickets[0]).startswith("error: unexpected ZeroDivisionError: while reading /")
    assert isinstance(run("inspect", tickets[0], "--debug").exception, ZeroDivisionError)


def test_json_has_no_infinity(monkeypatch: pytest.MonkeyPatch, tickets: list[Path]) -> None:
    monkeypatch.setattr(Mask, "sparsity", property(lambda mask: float("inf")))
    assert succeed("inspect", tickets[0])["sparsity"] is None


def parser_of(name: str) -> Any:
    return typer.main.get_command(app).commands[name]


def test_every_command_is_known() -> None:
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_the_help_parse(name: str) -> None:
    heading, *examples = parser_of(name).epilog.split("\n\n")
    assert heading in ("Example:", "Examples:")
    assert examples
    help_text = " ".join(run(name, "--help").stdout.split())
    for example in examples:
        plain = re.sub("^torchrun .* -m lottery_tickets ", "lottery-tickets ", example)
        program, subcommand, *arguments = shlex.split(plain)
        assert (program, subcommand) == ("lottery-tickets", name)
        assert example in help_text
        parser_of(name).make_context(name, arguments)  # raises what is wrong with them


def test_help_names_the_exit_codes() -> None:
    shown = " ".join(run("--help").stdout.split())
    assert "Exit codes: 0 done, 1 an error" in shown
    assert "2 wrong usage" in shown


# --- A process of its own ---


def process(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", code] if code else ["-m", "lottery_tickets"]), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(lottery_tickets.__file__).parents[1])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_as_a_process(model: Path, tickets: list[Path], tmp_path: Path) -> None:
    done = process("apply", model, tickets[0], "-o", tmp_path / "pruned", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["weights_pruned"] == round(0.3 * Mask.load(tickets[0]).numel)
    again = process("apply", model, tickets[0], "-o", tmp_path / "pruned")
    assert (again.returncode, again.stdout) == (1, "")
    assert re.fullmatch(r"error: .*exists already.*\n", again.stderr)
    traced = process("apply", model, tickets[0], "-o", tmp_path / "pruned", "--debug")
    assert traced.returncode == 1
    assert "Traceback (most recent call last)" in traced.stderr
    assert process("apply").returncode == 2


def test_version_and_help_load_no_torch() -> None:
    code = "import sys, lottery_tickets.cli; print({'torch', 'transformers', 'numba'} & sys.modules.keys())"
    assert process(code=code).stdout == "set()\n"
    assert process("--version").stdout == "lottery-tickets 0.1.0\n"


@pytest.mark.parametrize("name", lottery_tickets.__all__)
def test_names_of_the_root_are_found_when_they_are_used(name: str) -> None:
    assert getattr(lottery_tickets, name).__module__.startswith("lottery_tickets.")
    assert name in dir(lottery_tickets)


def test_a_name_the_root_does_not_have() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = lottery_tickets.nothing


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package look as if it were not installed."""

    def hide(package: str) -> None:
        monkeypatch.setitem(sys.modules, package, None)

    return hide


def test_a_missing_extra_is_named(model: Path, tmp_path: Path, without: Callable[[str], None]) -> None:
    without("transformers")
    scored = ("-s", 0.5, "--criterion", "synflow", "--rounds", 1)
    assert "pip install 'lottery-tickets[hf]'" in fail("mask", model, *scored, "-o", tmp_path / "x")


def test_magnitude_needs_no_transformers(model: Path, tmp_path: Path, without: Callable[[str], None]) -> None:
    expected = succeed("mask", model, "-s", 0.5, "-o", tmp_path / "with")
    without("transformers")
    found = succeed("mask", model, "-s", 0.5, "-o", tmp_path / "without")
    assert found["tickets"][0]["digest"] == expected["tickets"][0]["digest"]


def test_a_model_stored_otherwise_is_loaded(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise CheckpointError("stored otherwise than it is loaded")

    expected = succeed("mask", model, "-s", 0.5, "-o", tmp_path / "files")
    monkeypatch.setattr(_weights, "prunable_tensors", refuse)
    result = run("mask", model, "-s", 0.5, "-o", tmp_path / "loaded", "--json")
    assert "note: loading the model: stored otherwise than it is loaded" in result.stderr
    found = json.loads(result.stdout)
    assert found["tickets"][0]["digest"] == expected["tickets"][0]["digest"]
