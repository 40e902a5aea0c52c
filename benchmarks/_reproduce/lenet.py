"""LeNet-300-100 as in the first paper: tickets of every round, beside other weights and other masks.

A unit is one seed: its initial weights, its validation images, the order of its batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _reproduce._training import Data, of_round, once, step_and_look, train
from lottery_tickets import Mask
from lottery_tickets.iterative_pruning import compute_iterative_magnitude_pruning
from lottery_tickets.training import Recipe
from lottery_tickets.vision import Images, lenet_300_100

SETTINGS: dict[str, Any] = {
    "network": "LeNet-300-100, Glorot normal weights, biases zero",
    "optimizer": "adam",
    "learning_rate": 1.2e-3,
    "batch_size": 60,
    "validation_images": 5000,
    "epochs": 8,
    "eval_every_steps": 250,
    "rounds": 18,
    "prune_fraction": 0.2,
    "output_layer_fraction": 0.1,
    "control_rounds": [3, 6, 9, 12, 15, 18],
}
QUICK: dict[str, Any] = {
    "validation_images": 500,
    "epochs": 1,
    "eval_every_steps": 20,
    "rounds": 3,
    "control_rounds": [3],
}
CONTROLS = ("random re-initialisation", "random mask")
_OUTPUT = "5.weight"
_ELSEWHERE = 1_000_000  # seeds of other weights


def seconds(images: Images) -> float:
    """Expected for one seed, from a few steps and one look at the validation and test images."""
    data = data_of(images, 0)
    step, look = step_and_look(network(0), recipe(), data)
    steps = len(data.train) * SETTINGS["epochs"]
    trainings = 1 + SETTINGS["rounds"] + len(CONTROLS) * len(SETTINGS["control_rounds"])
    return trainings * (steps * step + steps / SETTINGS["eval_every_steps"] * look)


def recipe() -> Recipe:
    """How every network is trained."""
    return Recipe(optimizer=SETTINGS["optimizer"], learning_rate=SETTINGS["learning_rate"])


def data_of(images: Images, seed: int) -> Data:
    """The batches of a seed."""
    rest, validation = images.split(SETTINGS["validation_images"], seed)
    return Data(rest, validation, SETTINGS["batch_size"])


def network(seed: int) -> nn.Module:
    """The network with the initial weights of a seed."""
    torch.manual_seed(seed)
    return lenet_300_100(init="glorot")


def run(images: Images, seed: int, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """All networks of one seed; what is on disk already is not done again."""
    data = data_of(images, seed)
    rounds = once(folder / "tickets.json", partial(_tickets, data, seed, folder / "tickets"))["rounds"]
    tell("tickets of all rounds")
    networks = [
        {"kind": "ticket", "round": one["round"], "density": 1 - one["sparsity"], **of_round(one)}
        for one in rounds
    ]
    for number in SETTINGS["control_rounds"]:
        ticket = Mask.load(folder / "tickets" / "masks" / f"round-{number:02d}.safetensors")
        for kind in CONTROLS:
            name = f"{kind.replace(' ', '-')}-{number:02d}.json"
            networks.append(once(folder / name, partial(_control, kind, number, ticket, data, seed)))
            tell(f"{kind}, round {number}")
    return {"seed": seed, "networks": networks}


def _tickets(data: Data, seed: int, folder: Path) -> dict[str, Any]:
    results = compute_iterative_magnitude_pruning(
        network(seed),
        data.train,
        num_iterations=SETTINGS["rounds"],
        prune_fraction=SETTINGS["prune_fraction"],
        layer_fractions={_OUTPUT: SETTINGS["output_layer_fraction"]},
        scope="layer",
        epochs=SETTINGS["epochs"],
        optimizer=SETTINGS["optimizer"],
        learning_rate=SETTINGS["learning_rate"],
        eval_dataloader=data.validation,
        test_dataloader=data.test,
        eval_every_steps=SETTINGS["eval_every_steps"],
        run_dir=folder,
        seed=seed,
        progress=False,
    )
    return {"rounds": [results["dense"], *results["iterations"]]}


def _control(kind: str, number: int, ticket: Mask, data: Data, seed: int) -> dict[str, Any]:
    """The ticket's mask with other initial weights, or its weights with another mask of its layers' densities."""
    other = _ELSEWHERE + 100 * seed + number
    model = network(other if kind == "random re-initialisation" else seed)
    mask = Mask.random_like(ticket, other) if kind == "random mask" else ticket
    found = train(
        model,
        mask,
        data,
        recipe(),
        epochs=SETTINGS["epochs"],
        eval_every_steps=SETTINGS["eval_every_steps"],
        seed=seed,
    )
    return {"kind": kind, "round": number, "density": 1 - ticket.sparsity, **found}
