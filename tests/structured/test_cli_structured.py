"""`unit-mask`, `extract` and `early-bird --structure`, from folder to folder."""

from __future__ import annotations

import pytest
import torch

from lottery_tickets import Mask, applied, create_magnitude_mask
from test_cli import run, succeed
from unit_networks import llama, tokens


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    llama().save_pretrained(path)
    (path / "words.txt").write_text("the")
    return path


def load(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path).eval()


def test_from_a_model_to_a_smaller_one(folder, tmp_path):
    ticket, small = tmp_path / "heads.safetensors", tmp_path / "small"
    drawn = succeed("unit-mask", folder, "--unit", "head", "-s", 0.25, "-o", ticket)
    told = succeed("inspect", ticket)["metadata"]
    assert (told["structured_units"], told["unit"]) == ("8 heads in 2 layers", "head")
    assert {layer["kept"] for layer in drawn["layers"].values()} == {3}
    extracted = succeed("extract", folder, ticket, "-o", small, "--onnx")
    assert extracted["parameters_before"] - extracted["parameters"] == drawn["parameters_removed"]
    assert extracted["copied"] == ["words.txt"]
    assert (small / "model.onnx").stat().st_size > 0
    model, less = load(folder), load(small)
    with torch.no_grad(), applied(model, Mask.load(ticket)):
        torch.testing.assert_close(less(**tokens()).logits, model(**tokens()).logits, rtol=1e-5, atol=1e-5)
    assert "of" in run("extract", folder, ticket, "-o", tmp_path / "again").stdout
    assert "layers keep from 15 to 15" in run(
        *("unit-mask", folder, "--unit", "neuron", "-s", 0.25, "-o", ticket)
    ).stdout.replace("\n", " ")


def test_what_cannot_be_extracted(folder, tmp_path):
    create_magnitude_mask(load(folder), 0.5).save(tmp_path / "weights.safetensors")
    result = run("extract", folder, tmp_path / "weights.safetensors", "-o", tmp_path / "small")
    assert result.exit_code == 1
    assert "removes single weights" in result.stderr
    assert not (tmp_path / "small").exists()
    drawn = run("unit-mask", folder, "--unit", "channel", "-s", 0.5, "-o", tmp_path / "channels.safetensors")
    assert drawn.exit_code == 1
    assert "no channel that can leave" in drawn.stderr


def test_early_bird_of_channels(tmp_path, monkeypatch):
    from lottery_tickets import vision

    pictures = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    digits = torch.arange(64) % 10
    monkeypatch.setitem(vision.DATASETS, "mnist", lambda: vision.Images(pictures, digits, pictures, digits))
    found = succeed(
        *("early-bird", "batchnorm-cnn", "--data", "mnist", "--structure", "channel", "--bn-l1", 1e-4),
        *("-s", 0.3, "-s", 0.5, "--epochs", 1, "-o", tmp_path / "run"),
    )
    for result, gone in zip(found["results"], (58, 96), strict=True):
        mask = Mask.load(tmp_path / "run" / f"early-bird-{result['target_sparsity']}.safetensors")
        assert sum(int((~kept).sum()) for kept in mask.units.kept_in(mask).values()) == gone
