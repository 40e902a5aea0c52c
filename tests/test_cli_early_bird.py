"""`early-bird`: what it trains, writes and prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lottery_tickets import Mask, prunable_parameters
from lottery_tickets._controls import train_side_by_side
from lottery_tickets._statistics import share_interval
from lottery_tickets.errors import EvaluationError
from lottery_tickets.training import tensors_of
from lottery_tickets.vision import DATASETS, NETWORKS, Images
from test_cli import fail, model, run, succeed, text  # noqa: F401  # fixtures among them

QUICK = ("--epochs", 6, "--learning-rate", 0.1, "--batch-size", 20)


@pytest.fixture
def few_digits(mnist: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Images:
    """A hundred digits, so that epochs take no time."""
    images, labels = mnist[0][::50] - 0.13, mnist[1][::50]
    few = Images(images, labels, images, labels)
    monkeypatch.setitem(DATASETS, "mnist", lambda: few)
    return few


def test_a_bird_is_found_saved_and_held_against_controls(few_digits: Images, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("early-bird", "lenet-300-100", "--data", "mnist", "-s", 0.5, "-s", 0.8, *QUICK, "-o", output)
    report = succeed(*arguments, "--controls", "--control-epochs", 2, "--plot")
    assert [result["target_sparsity"] for result in report["results"]] == [0.5, 0.8]
    for result, path in zip(report["results"], report["tickets"], strict=True):
        ticket = Mask.load(path)
        assert ticket.digest() == result["digest"]
        assert ticket.sparsity == pytest.approx(result["target_sparsity"], abs=1e-5)
        assert ticket.metadata["base_model"] == "lenet-300-100"
        assert ticket.metadata["converged"] == str(result["converged"])
    assert list(report["controls"]) == ["dense", "ticket 0.5", "random 0.5", "ticket 0.8", "random 0.8"]
    for one in report["controls"].values():
        low, high = one["accuracy_interval"]
        assert low <= one["accuracy"] <= high
    assert report["controls"]["random 0.8"]["sparsity"] == report["controls"]["ticket 0.8"]["sparsity"]
    assert all(Path(picture).read_bytes().startswith(b"\x89PNG") for picture in report["pictures"])
    assert json.loads((output / "results.json").read_text()) == report
    again = run(*arguments, "--plot")  # goes on from where it ended: nothing is trained anew
    assert again.exit_code == 0, again.output
    assert "settled" in again.stdout
    assert "0.8" in again.stdout
    assert Mask.load(report["tickets"][0]).digest() == report["results"][0]["digest"]


def test_a_language_model_is_searched_by_steps(model: Path, text: Path, tmp_path: Path) -> None:  # noqa: F811
    report = succeed(
        "early-bird", model, "--data", text, "--context", 16, "--samples", 12, "--batch-size", 2, "--epochs", 1,
        "--check-every-steps", 2, "--criterion", "queue", "-o", tmp_path / "run",
    )  # fmt: skip
    (result,) = report["results"]
    assert "--plot" in fail(
        "early-bird", model, "--data", text, "--context", 16, "--samples", 12, "--batch-size", 2, "--epochs", 1,
        "--check-every-steps", 2, "--criterion", "queue", "-o", tmp_path / "run", "--plot",
    )  # fmt: skip
    assert [look["step"] for look in result["checkpoints"]] == [0, 2, 4, 6][: len(result["checkpoints"])]
    assert result["method"] == "queue"
    ticket = Mask.load(report["tickets"][0])
    assert ticket.metadata["weights_digest"]
    assert ticket.metadata["context"] == "16"


def test_what_cannot_be_is_refused_before_anything_is_trained(
    model: Path,  # noqa: F811
    text: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    run_folder = ("-o", tmp_path / "run")
    assert "images" in fail("early-bird", "lenet-300-100", "--data", text, *run_folder)
    for arguments, message in (
        (("early-bird", model, "--data", "mnist"), "images are for"),
        (("early-bird", model, "--data", tmp_path / "nothing.txt"), "neither a file"),
        (("early-bird", model, "--data", text, "--context", 16, "--controls"), "no classes"),
    ):
        result = run(*arguments, *run_folder)
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "run").exists()


# --- Networks side by side ---


def test_all_start_from_the_same_weights_and_zeros_are_held(few_digits: Images) -> None:
    torch.manual_seed(0)
    network = NETWORKS["lenet-300-100"]()
    initial = {name: one.clone() for name, one in tensors_of(network).items()}
    data = [(few_digits.train_inputs, few_digits.train_labels)]
    mask = Mask.random_like(_half(network), 0)
    options = {"epochs": 2, "learning_rate": 0.1, "progress": False}
    both = train_side_by_side(network, initial, {"a": mask, "dense": None, "b": mask}, data, data, **options)
    assert {**both["a"], "seconds": 0} == {**both["b"], "seconds": 0}
    for name in mask:
        assert not network.get_parameter(name).detach()[~mask[name]].any()
        assert network.get_parameter(name).detach()[mask[name]].any()
    assert both["dense"]["sparsity"] == 0
    assert both["a"]["accuracy"] != both["dense"]["accuracy"]
    numbers = [(few_digits.train_inputs, torch.zeros(len(few_digits.train_labels), 10))]
    with pytest.raises(EvaluationError, match="classes"):
        train_side_by_side(network, initial, {"dense": None}, data, numbers, **options)


def _half(network: torch.nn.Module) -> Mask:
    return Mask.from_tensors(
        {name: torch.arange(one.numel()).view(one.shape) % 2 for name, one in prunable_parameters(network).items()}
    )


def test_the_interval_of_a_share_is_wilsons() -> None:
    from scipy.stats import norm

    z = float(norm.ppf(0.975))
    for count, total in ((0, 10), (7, 10), (10, 10), (930, 1000)):
        share = count / total
        middle = (share + z * z / (2 * total)) / (1 + z * z / total)
        half = z * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5 / (1 + z * z / total)
        assert share_interval(count, total, 0.95) == pytest.approx((middle - half, middle + half), abs=1e-12)


@pytest.mark.slow
def test_smollm2_is_searched_on_real_text(smollm2_folder: Path, english_text: str, tmp_path: Path) -> None:
    """A few small steps do not move the mask of a pretrained model far, and it is not for standing still."""
    bible = tmp_path / "bible.txt"
    bible.write_text(english_text[2_000_000:2_010_000], encoding="utf-8")
    report = succeed(
        "early-bird", smollm2_folder, "--data", bible, "--context", 64, "--samples", 8, "--batch-size", 2,
        "--epochs", 1, "--check-every-steps", 1, "--lr", 0.001, "--criterion", "queue", "--window", 3,
        "-s", 0.5, "-s", 0.3, "-o", tmp_path / "run",
    )  # fmt: skip
    for result, path in zip(report["results"], report["tickets"], strict=True):
        assert result["target_sparsity"] == Mask.load(path).sparsity
        for look in result["checkpoints"][1:]:
            assert look["train_loss"] > 0
            assert 0 < look["distances"][-1] < 0.1
            assert look["moved_fraction"] > 0.5
        assert result["converged"], result["reason"]
