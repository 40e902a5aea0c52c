"""A small CNN with batch normalisation: from where on training is stable, and tickets rewound to before and after.

A unit is one seed: its initial weights, its images, the order of its batches. The instability of the dense network
over rewinding steps says from where on the order of the data no longer decides where training ends; tickets are
rewound to the initialisation and to a step by which that curve has come down, and their own instability is looked
at at both.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from _reproduce._training import Data, of_round, once, step_and_look
from lottery_tickets import Mask
from lottery_tickets.iterative_pruning import compute_iterative_magnitude_pruning
from lottery_tickets.stability import compute_instability, make_train_function
from lottery_tickets.training import Recipe
from lottery_tickets.vision import Images, TensorBatches, batchnorm_cnn

SETTINGS: dict[str, Any] = {
    "network": "CNN with batch normalisation",
    "optimizer": "sgd",
    "learning_rate": 0.05,
    "momentum": 0.9,
    "schedule": "linearly down to a hundredth",
    "batch_size": 60,
    "training_images": 6000,
    "validation_images": 1000,
    "test_images": 2000,
    "statistics_images": 600,
    "epochs": 3,
    "eval_every_steps": 50,
    "rounds": 4,
    "prune_fraction": 0.5,
    "rewind_steps": [0, 40],
    "instability_steps": [0, 10, 40, 120],
    "points": 11,
}
QUICK: dict[str, Any] = {
    "training_images": 1200,
    "validation_images": 300,
    "test_images": 500,
    "statistics_images": 300,
    "epochs": 1,
    "eval_every_steps": 10,
    "rounds": 2,
    "rewind_steps": [0, 10],
    "instability_steps": [0, 10],
    "points": 5,
}


def seconds(images: Images) -> float:
    """Expected for one seed, from a few steps and one look at the validation images."""
    data, length = data_of(images, 0), SETTINGS["epochs"] * SETTINGS["training_images"] // SETTINGS["batch_size"]
    step, look = step_and_look(network(0), recipe(), data)
    tickets = len(SETTINGS["rewind_steps"]) * (1 + SETTINGS["rounds"]) * length
    pairs = [*SETTINGS["instability_steps"], *SETTINGS["rewind_steps"]]
    siblings = sum(2 * (length - at) for at in pairs)
    looks = tickets / SETTINGS["eval_every_steps"] + len(pairs) * SETTINGS["points"]
    return (tickets + siblings) * step + looks * look


def scheduler(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate, down to a hundredth at the end."""
    length = SETTINGS["epochs"] * SETTINGS["training_images"] // SETTINGS["batch_size"]
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=length)


def recipe() -> Recipe:
    """How every network is trained."""
    return Recipe(
        optimizer=SETTINGS["optimizer"],
        learning_rate=SETTINGS["learning_rate"],
        momentum=SETTINGS["momentum"],
        scheduler=scheduler,
    )


def data_of(images: Images, seed: int) -> Data:
    """Some images, drawn by the seed; those to test on are the same for all."""
    rest, validation = images.split(SETTINGS["validation_images"], seed)
    few = rest.split(SETTINGS["training_images"], seed)[1]
    every = max(1, len(images.test_labels) // SETTINGS["test_images"])
    tested = (one[::every] for one in (images.test_inputs, images.test_labels))
    return Data(Images(*few, *tested), validation, SETTINGS["batch_size"])


def network(seed: int) -> nn.Module:
    """The network with the initial weights of a seed."""
    torch.manual_seed(seed)
    return batchnorm_cnn()


def run(images: Images, seed: int, folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
    """All of one seed; what is on disk already is not done again."""
    data = data_of(images, seed)
    dense = once(folder / "instability.json", partial(_instability, data, seed, folder / "instability"))
    tell("instability of the dense network")
    networks, tickets = [], []
    for at in SETTINGS["rewind_steps"]:
        place = folder / f"tickets-{at}"
        rounds = once(folder / f"tickets-{at}.json", partial(_tickets, data, seed, at, place))["rounds"]
        networks += [
            {"rewind_step": at, "round": one["round"], "density": 1 - one["sparsity"], **of_round(one)}
            for one in rounds
        ]
        tell(f"tickets rewound to step {at}")
        mask = Mask.load(place / "masks" / f"round-{SETTINGS['rounds']:02d}.safetensors")
        work = partial(_instability, data, seed, folder / f"instability-{at}", mask, [at])
        tickets += once(folder / f"instability-{at}.json", work)["pairs"]
        tell(f"instability of the sparsest of them, {mask.sparsity:.4f}")
    return {"seed": seed, "networks": networks, "instability": {"dense": dense["pairs"], "ticket": tickets}}


def _tickets(data: Data, seed: int, at: int, folder: Path) -> dict[str, Any]:
    results = compute_iterative_magnitude_pruning(
        network(seed),
        data.train,
        num_iterations=SETTINGS["rounds"],
        prune_fraction=SETTINGS["prune_fraction"],
        rewind_step=at,
        epochs=SETTINGS["epochs"],
        optimizer=SETTINGS["optimizer"],
        learning_rate=SETTINGS["learning_rate"],
        momentum=SETTINGS["momentum"],
        scheduler=scheduler,
        eval_dataloader=data.validation,
        test_dataloader=data.test,
        eval_every_steps=SETTINGS["eval_every_steps"],
        run_dir=folder,
        seed=seed,
        progress=False,
    )
    return {"rounds": [results["dense"], *results["iterations"]]}


def _instability(
    data: Data, seed: int, folder: Path, mask: Mask | None = None, steps: list[int] | None = None
) -> dict[str, Any]:
    train = make_train_function(
        data.train,
        SETTINGS["epochs"],
        optimizer=SETTINGS["optimizer"],
        learning_rate=SETTINGS["learning_rate"],
        momentum=SETTINGS["momentum"],
        scheduler=scheduler,
    )
    inputs, labels = next(iter(TensorBatches(*data.training, SETTINGS["statistics_images"])))
    found = compute_instability(
        network,
        train,
        steps or SETTINGS["instability_steps"],
        [seed],
        dataloader=data.test,
        points=SETTINGS["points"],
        mask=mask,
        recompute_batchnorm=TensorBatches(inputs, labels, SETTINGS["batch_size"]),
        run_dir=folder,
        progress=False,
    )
    kept = ("seed", "rewind_step", "errors", "error_barrier", "loss_barrier")
    return {"pairs": [{name: pair[name] for name in kept} for pair in found["pairs"]]}  # type: ignore[literal-required]
