"""`imp`, `verdict` and `stability`: what they train, write and print, and how they go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import t as student

import lottery_tickets
from lottery_tickets import Mask, compute_iterative_magnitude_pruning, compute_ticket_verdict
from lottery_tickets.cli._plan import Plan
from lottery_tickets.runs import RunFolder
from lottery_tickets.training import digest_of
from lottery_tickets.vision import DATASETS, Images
from test_cli import fail, run, succeed

# A network of the user's own, its data made up. `make` seeds nothing itself.
MODULE = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))

def seeded(seed):
    torch.manual_seed(seed)
    return make()

class Net(nn.Sequential):
    def __init__(self, width=12, *, seed=0):
        torch.manual_seed(seed)
        super().__init__(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

def loaders():
    inputs = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))
    labels = inputs[:, :3].argmax(1)
    data = torch.utils.data.TensorDataset(inputs[:48], labels[:48])
    return (
        torch.utils.data.DataLoader(data, 8, shuffle=True),
        [(inputs[48:64], labels[48:64])],
        [(inputs[64:], labels[64:])],
    )

def named():
    train, validation, _ = loaders()
    return {"train": train, "validation": validation}

def numbers():
    inputs = torch.randn(32, 6)
    return [(inputs, inputs[:, :3])], (inputs, inputs[:, :3])

def unending():
    train, validation, _ = loaders()
    return (batch for batch in train), validation

def broken(seed):
    raise RuntimeError("no such luck")

number = 3
"""

QUICK = ("--rounds", 2, "--target", 0.75, "--epochs", 2, "--lr", 0.05, "--save-every", 1000)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks as small as these would only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The arguments that name a model and data of one's own, in the current directory."""
    (tmp_path / "mynet.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "mistyped.py").write_text("import nothing_of_that_name\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # the power does not fail here, and disks are slow
    for name in ("mynet", "mistyped"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return ("--model", "mynet:make", "--data", "mynet:loaders")


@pytest.fixture
def few_digits(mnist: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Images:
    """A hundred digits, so that epochs take no time."""
    images, labels = mnist[0][::50], mnist[1][::50]
    few = Images(images, labels, images, labels)
    monkeypatch.setitem(DATASETS, "mnist", lambda: few)
    return few


def without_seconds(report: Any) -> Any:
    """The report, with what the clock says left out."""
    if isinstance(report, dict):
        return {name: without_seconds(one) for name, one in report.items() if name != "seconds"}
    return [without_seconds(one) for one in report] if isinstance(report, list) else report


def usage_error(*arguments: object) -> str:
    """What a command that was used wrongly says, as one line."""
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return " ".join(result.stderr.replace("│", " ").split())


# --- imp ---


def test_the_table_is_of_what_the_library_finds(few_digits: Images, tmp_path: Path) -> None:
    output = tmp_path / "run"
    arguments = ("imp", "lenet", "--dataset", "mnist", *QUICK, "--batch-size", 20, "-o", output)
    report = succeed(*arguments, "--seeds", 2, "--plot", "--init", "glorot", "--output-fraction", 0.2)
    assert json.loads((output / "results.json").read_text()) == report
    assert (report["network"], report["data"], report["seeds"]) == ("lenet-300-100", "mnist", [0, 1])
    assert [one["round"] for one in report["rounds"]] == [0, 1, 2]
    assert [one["sparsity"] for one in report["rounds"]] == pytest.approx([0, 0.5, 0.75], abs=1e-5)
    assert report["measured_on"] == "test"
    assert Path(report["picture"]).read_bytes().startswith(b"\x89PNG")
    for seed in (0, 1):
        told = report["runs"][str(seed)]
        masks = [
            Mask.load(output / f"seed-{seed}" / "masks" / f"round-{number:02d}.safetensors") for number in (1, 2)
        ]
        assert [mask.digest() for mask in masks] == [one["mask_digest"] for one in told["rounds"][1:]]
        assert told["digest"] == masks[-1].digest()
        assert masks[1].layer_sparsity()["5.weight"] == pytest.approx(1 - 0.8**2, abs=1e-3)
    assert report["runs"]["0"]["digest"] != report["runs"]["1"]["digest"]
    last = report["rounds"][-1]["numbers"]["early_stopping_test_accuracy"]
    values = [report["runs"][seed]["rounds"][-1]["early_stopping_test_accuracy"] for seed in "01"]
    mean, half = sum(values) / 2, student.ppf(0.975, 1) * abs(values[0] - values[1]) / 2
    assert last["values"] == values
    assert [last["mean"], *last["interval"]] == pytest.approx([mean, mean - half, mean + half])


def test_it_is_the_librarys_experiment(mine: tuple[object, ...]) -> None:
    """Model and data by name, with the seed for both, and every option handed on."""
    options = ("--scope", "layer", "--optimizer", "sgd", "--momentum", 0.5, "--weight-decay", 0.01)
    more = ("--rewind-step", 3, "--schedule", "steps", "--eval-every", 4, "--exclude", "2.weight")
    report = succeed(
        "imp", "--model", "mynet:seeded", *mine[2:], *QUICK, *options, *more, "--first-seed", 5, "-o", "r"
    )
    mynet = import_module("mynet")  # the command has looked in the current directory
    train, validation, test = mynet.loaders()
    results = compute_iterative_magnitude_pruning(
        mynet.seeded(5),
        train,
        0.75,
        2,
        epochs=2,
        optimizer="sgd",
        learning_rate=0.05,
        momentum=0.5,
        weight_decay=0.01,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [6, 9]),
        eval_dataloader=validation,
        test_dataloader=test,
        eval_every_steps=4,
        rewind_step=3,
        scope="layer",
        exclude="2.weight",
        seed=5,
        progress=False,
    )
    assert report["seeds"] == [5]
    told = report["runs"]["5"]
    expected = [results["dense"], *results["iterations"]]
    for one in expected:
        del one["evaluations"]
    assert without_seconds(told["rounds"]) == without_seconds(json.loads(json.dumps(expected)))
    assert told["digest"] == results["final_mask"].digest()
    assert told["rewind_step"] == 3
    rewound = load_file("r/seed-5/rewind/model.safetensors")
    assert digest_of(rewound) == digest_of(results["rewind_state"])


def test_a_seed_is_given_where_there_is_a_parameter_for_it(mine: tuple[object, ...]) -> None:
    digests = {}
    for name in ("make", "seeded", "Net"):
        report = succeed(
            "imp", "--model", f"mynet:{name}", *mine[2:], *QUICK, "--rounds", 1, "--seeds", 2, "-o", name
        )
        digests[name] = [report["runs"][seed]["digest"] for seed in "01"]
    assert digests["seeded"] == digests["Net"]
    assert all(first != second for first, second in digests.values())


def test_data_without_test_part_or_classes(mine: tuple[object, ...]) -> None:
    named = succeed("imp", *mine[:2], "--data", "mynet:named", *QUICK, "-o", "named")
    assert named["measured_on"] == "validation"
    assert "test_loss" not in named["rounds"][0]["numbers"]
    shown = run("imp", *mine[:2], "--data", "mynet:numbers", *QUICK, "--plot", "-o", "numbers")
    assert shown.exit_code == 0, shown.output
    assert "validation loss" in shown.stdout
    assert "accuracy" not in shown.stdout


def test_more_seeds_are_added_and_nothing_is_trained_twice(mine: tuple[object, ...]) -> None:
    first = succeed("imp", *mine, *QUICK, "-o", "r")
    shown = run("imp", *mine, *QUICK, "--seeds", 3, "-o", "r")
    assert shown.exit_code == 0, shown.output
    assert re.findall(r"seed \d \(", shown.stderr) == ["seed 1 (", "seed 2 ("]
    assert "3 seeds" in shown.stdout
    assert "50.00%" in shown.stdout
    report = json.loads(Path("r/results.json").read_text())
    assert report["runs"]["0"] == first["runs"]["0"]  # the seconds too
    assert Plan.of(Path("r")).target == 0.75


def test_a_killed_command_goes_on(mine: tuple[object, ...]) -> None:
    arguments = ("imp", *mine, *QUICK, "--epochs", 12, "--save-every", 30, "--seeds", 2)
    whole = succeed(*arguments, "-o", "whole")
    command = [sys.executable, "-m", "lottery_tickets", *map(str, arguments), "-o", "r"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(lottery_tickets.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    masks = Path("r/seed-0/masks")
    while not masks.exists() and process.poll() is None:
        time.sleep(0.01)
    assert process.poll() is None, "it ended before it could be killed"
    assert "in use by process" in fail(*arguments, "-o", "r").split("error: ")[-1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Path("r/results.json").exists()
    assert "has not ended" in fail("verdict", "r")
    there = {path.name for path in Path("r").glob("seed-*")}
    assert there == {"seed-0"}
    report = succeed(*arguments, "-o", "r")
    differing = ("run", "memory")
    assert {name: one for name, one in without_seconds(report).items() if name not in differing} == {
        name: one for name, one in without_seconds(whole).items() if name not in differing
    }


def test_another_configuration_is_refused(mine: tuple[object, ...]) -> None:
    succeed("imp", *mine, *QUICK, "-o", "r")
    before = Path("r/results.json").read_bytes()
    message = fail("imp", *mine, *QUICK, "--lr", 0.1, "--exclude", "2.*", "-o", "r")
    assert 'learning_rate: 0.05 there, 0.1 now; exclude: null there, ["2.*"] now' in message
    assert Path("r/results.json").read_bytes() == before
    with RunFolder.open("r", Plan.of(Path("r")).configuration()):
        assert "in use" in fail("imp", *mine, *QUICK, "-o", "r")


WRONG_USAGE = {
    "nothing to train": ("imp", "give either NETWORK or --model"),
    "two networks": ("imp lenet --model a:b --dataset mnist", "give either NETWORK or --model"),
    "no data": ("imp lenet", "give either --dataset or --data"),
    "unknown network": ("imp resnet --dataset mnist", "resnet is none of lenet, lenet-300-100"),
    "unknown images": ("imp lenet --dataset cifar", "cifar is none of mnist, fashion-mnist"),
    "a file for a module": (
        "imp --model mynet.py --data mynet:loaders",
        "not of the form package.module:function",
    ),
    "batches of another's loaders": (
        "imp --model a:b --data a:c --batch-size 4",
        "the loaders of --data decide it",
    ),
    "two targets": ("imp lenet --dataset mnist --target 0.9 --prune-fraction 0.2", "and --prune-fraction too"),
    "no glob": ("imp lenet --dataset mnist --layer-fraction 0.1", "'0.1' is not GLOB=FRACTION"),
    "no fraction": ("imp lenet --dataset mnist --layer-fraction a=b", "'a=b' is not GLOB=FRACTION"),
    "momentum of adam": ("imp lenet --dataset mnist --momentum 0.9", "it is of sgd, not of adam"),
    "weights of another network": ("imp batchnorm-cnn --dataset mnist --init glorot", "glorot is for lenet"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG_USAGE.values(), ids=WRONG_USAGE.keys())
def test_wrong_usage_is_told(arguments: str, message: str, tmp_path: Path) -> None:
    assert message in usage_error(*arguments.split(), "-o", tmp_path / "r")
    assert not (tmp_path / "r").exists()


REFUSED = {
    "absent module": (
        "--model absent:make",
        "--model absent:make: absent cannot be imported (ModuleNotFoundError",
    ),
    "module with a mistake": ("--model mistyped:make", "mistyped cannot be imported"),
    "absent function": ("--model mynet:nothing", "mynet has no nothing"),
    "no function": ("--model mynet:number", "a function or a class is expected, got int"),
    "failing function": ("--model mynet:broken", "mynet:broken: RuntimeError: no such luck"),
    "no model": ("--model mynet:loaders", "it returned tuple, not a torch module"),
    "no loaders": ("--data mynet:make", "a mapping with these names; got Sequential"),
    "schedule without an end": ("--data mynet:unending --schedule cosine", "does not say how many batches it has"),
    "late rewinding": ("--rewind-step 1000", "rewind_step=1000, but training has 12 steps"),
    "unknown layer": ("--layer-fraction head=0.1", "'head' matches none of the prunable tensors"),
    "target of 1": ("--target 1.0", "target_sparsity"),
    "absent device": ("--device abacus", "--device abacus"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_trained_leaves_no_folder(mine: tuple[object, ...], arguments: str, message: str) -> None:
    own = [*arguments.split()]
    default = [one for pair in (mine[:2], mine[2:]) if pair[0] not in own for one in pair]
    assert message in fail("imp", *default, *QUICK, *own, "-o", "r")
    assert not Path("r").exists()


def test_a_refusal_leaves_a_folder_that_was_there(mine: tuple[object, ...]) -> None:
    Path("r").mkdir()
    Path("r/notes.txt").write_text("mine")
    fail("imp", *mine, *QUICK, "--rewind-step", 1000, "-o", "r")
    assert Path("r/notes.txt").read_text() == "mine"
    succeed("imp", *mine, *QUICK, "-o", "r")  # the attempt has not claimed the folder


# --- verdict ---


def test_tickets_are_judged_as_the_library_does(mine: tuple[object, ...]) -> None:
    succeed("imp", "--model", "mynet:seeded", *mine[2:], *QUICK, "--seeds", 3, "-o", "r")
    report = succeed(
        "verdict", "r", "--round", 1, "--controls", "dense,random-mask", "--margin", 0.1, "--seeds", 2
    )
    mynet = import_module("mynet")
    expected = compute_ticket_verdict(
        mynet.seeded,
        lambda seed: mynet.loaders(),
        [Mask.load(f"r/seed-{seed}/masks/round-01.safetensors") for seed in (0, 1)],
        (0, 1),
        ("dense", "random_mask"),
        margin=0.1,
        epochs=2,
        optimizer="adam",
        learning_rate=0.05,
        progress=False,
    )
    for name in ("verdict", "reason", "networks", "differences", "tests", "score"):
        assert report[name] == json.loads(json.dumps(expected[name])), name
    assert json.loads(Path("r/verdict/round-01/results.json").read_text()) == report
    dense = report["networks"]["dense"]["early_stopping_accuracy"]["values"]
    told = json.loads(Path("r/results.json").read_text())["rounds"][0]["numbers"]
    assert dense == told["early_stopping_test_accuracy"]["values"][:2]  # trained as in the run itself
    shown = run("verdict", "r", "--round", 1, "--controls", "dense,random_mask,random_reinit", "--margin", 0.1)
    assert shown.exit_code == 0, shown.output
    assert "3 seeds" in shown.stdout
    again = json.loads(Path("r/verdict/round-01/results.json").read_text())["trainings"]
    by_name = {(one["network"], one["seed"]): one for one in again}
    assert len(by_name) == 12
    for one in report["trainings"]:  # the seconds too: those were not trained again
        assert by_name[one["network"], one["seed"]] == one


def test_the_ticket_of_one_seed_is_judged_over_orders(mine: tuple[object, ...]) -> None:
    """From the weights it is meant for: those of the rewinding point."""
    succeed("imp", *mine, *QUICK, "--rewind-step", 4, "--first-seed", 7, "-o", "r")
    report = succeed("verdict", "r", "--seeds", 3, "--controls", "dense,random_reinit", "--judged-at", "end")
    assert "weights of step 4" in report["start"]
    assert [one["seed"] for one in report["trainings"][::3]] == [7, 8, 9]
    rewound = digest_of(load_file("r/seed-7/rewind/model.safetensors"))
    for one in report["trainings"]:
        assert (one["weights"] == rewound) == (one["network"] != "random_reinit")
    assert "one ticket" in report["population"]
    assert report["score"] == "accuracy"
    assert Path("r/verdict/round-02-seed-7/results.json").exists()


def test_what_cannot_be_judged(mine: tuple[object, ...]) -> None:
    assert "no such folder" in fail("verdict", "r")
    Path("r").mkdir()
    assert "r/config.json" in fail("verdict", "r")
    succeed("imp", *mine, *QUICK, "--seeds", 2, "-o", "r2")
    assert "none that this version's `imp` began" in fail("verdict", "r2/seed-0")
    assert "r2 has 2 rounds" in usage_error("verdict", "r2", "--round", 3)
    assert "imp adds more to it with --seeds 4" in usage_error("verdict", "r2", "--seeds", 4)
    assert "controls lacks 'dense'" in fail("verdict", "r2", "--controls", "random_mask")
    assert "got dense, bird" in fail("verdict", "r2", "--controls", "dense,bird")
    assert "confidence" in fail("verdict", "r2", "--confidence", 95)
    assert not Path("r2/verdict").exists()


# --- stability ---


def test_the_step_to_rewind_to(mine: tuple[object, ...]) -> None:
    succeed("imp", *mine, *QUICK, "--seeds", 2, "-o", "r")
    report = succeed("stability", "r", "--steps", "0,6", "--seeds", 2, "--points", 3, "--plot")
    assert [one["rewind_step"] for one in report["curve"]] == [0, 6]
    assert report["subject"] == "dense"
    assert json.loads(Path("r/stability/dense/results.json").read_text()) == report
    assert Path(report["picture"]).read_bytes().startswith(b"\x89PNG")
    again = run("stability", "r", "--steps", "6,0", "--seeds", 2, "--points", 3, "--threshold", 1e-9)
    assert again.exit_code == 0, again.output
    assert "error barrier" in again.stdout
    assert "rewind_steps: [0, 6] there, [0, 3] now" in fail(
        "stability", "r", "--steps", "0,3", "--seeds", 2, "--points", 3
    )
    tickets = succeed("stability", "r", "--round", 2, "--steps", "3", "--points", 2, "-o", "elsewhere")
    assert (tickets["subject"], tickets["seeds"]) == ("round-02", [0, 1])
    assert Path("elsewhere/results.json").exists()
    assert tickets["curve"][0]["loss"] != report["curve"][0]["loss"]


def test_stability_needs_no_more_than_a_run_that_began(mine: tuple[object, ...]) -> None:
    plan = Plan.of(_begun(mine))
    assert plan.epochs == 2
    report = succeed("stability", "r", "--seeds", 1, "--points", 2, "--metric", "loss", "--threshold", 100)
    steps = [one["rewind_step"] for one in report["curve"]]
    assert steps == sorted({round(share * 12) for share in (0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)})
    assert report["rewind_step"] == 0
    assert "has not ended" in fail("stability", "r", "--round", 1)
    assert "whole numbers" in usage_error("stability", "r", "--steps", "early")
    assert "training has 12 steps" in usage_error("stability", "r", "--steps", "0,12", "-o", "none")
    assert "non-negative" in fail("stability", "r", "--steps", "-1", "-o", "none")
    assert not Path("none").exists()


def _begun(mine: tuple[object, ...]) -> Path:
    """A folder as a command leaves it that was killed at once."""
    succeed("imp", *mine, *QUICK, "-o", "whole")
    configuration = Plan.of(Path("whole")).configuration()
    with RunFolder.open("r", configuration) as folder:
        folder.save({}, {})
    return Path("r")
