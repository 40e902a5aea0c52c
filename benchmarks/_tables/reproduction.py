"""The papers, again: what the figures of docs/reproduction.md are drawn from, in figures of the other kind."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from _tables._format import Results, load, machine_line

KINDS = ("ticket", "random re-initialisation", "random mask")


def reproduction() -> str:
    """Tickets and their controls."""
    found = load("reproduce")
    lenet, cnn = found["lenet"], found["cnn"]
    settings, small = lenet["settings"], cnn["settings"]
    return f"""## The papers, again

What [the reproduction](reproduction.md) measured, by `{found["command"]}` on {found["data"]}; means over
{len(lenet["seeds"])} seeds, and the least and the greatest. {settings["network"]}: Adam at
{settings["learning_rate"]}, batches of {settings["batch_size"]}, {settings["epochs"]} epochs, looked at every
{settings["eval_every_steps"]} steps. Test accuracy at early stopping (least validation loss), and that iteration:

{lenet_table(lenet)}

{small["network"]}, {small["training_images"]:,} images, {small["epochs"]} epochs of SGD with momentum, over
{len(cnn["seeds"])} seeds: the barrier of the test error between two copies that part at step k, of the dense
network and of the sparsest ticket rewound to k, and the test accuracy of tickets rewound to k:

{barrier_table(cnn)}

{cnn_table(cnn)}

{machine_line(found)}
"""


def lenet_table(found: Results) -> str:
    """By density."""
    networks = [one for unit in found["seeds"] for one in unit["networks"]]
    lines = ["| weights left | " + " | ".join(KINDS) + " |", "| --- |" + " --- |" * len(KINDS)]
    for number in sorted({one["round"] for one in networks}):
        here = [one for one in networks if one["round"] == number]
        cells = []
        for kind in KINDS:
            mine = [one for one in here if one["kind"] == kind]
            accuracy = spread(mine, lambda one: 100 * one["early_stopping_test_accuracy"], 2)
            cells.append(
                f"{accuracy}% at {spread(mine, lambda one: one['early_stopping_step'], 0)}" if mine else ""
            )
        lines.append(f"| {100 * here[0]['density']:.1f}% | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def barrier_table(found: Results) -> str:
    """By rewinding step."""
    lines = ["| k | dense network | sparsest ticket |", "| --- | --- | --- |"]
    pairs = {
        kind: [one for unit in found["seeds"] for one in unit["instability"][kind]] for kind in ("dense", "ticket")
    }
    for step in sorted({one["rewind_step"] for one in pairs["dense"]}):
        cells = [
            spread([one for one in mine if one["rewind_step"] == step], lambda one: 100 * one["error_barrier"], 1)
            for mine in pairs.values()
        ]
        lines.append(f"| {step} | " + " | ".join(f"{cell}%" if cell else "" for cell in cells) + " |")
    return "\n".join(lines)


def cnn_table(found: Results) -> str:
    """By density."""
    networks = [one for unit in found["seeds"] for one in unit["networks"]]
    steps = sorted({one["rewind_step"] for one in networks})
    lines = [
        "| weights left | " + " | ".join(f"k = {step}" for step in steps) + " |",
        "| --- |" + " --- |" * len(steps),
    ]
    for number in sorted({one["round"] for one in networks}):
        here = [one for one in networks if one["round"] == number]
        cells = [
            spread([one for one in here if one["rewind_step"] == step], lambda one: 100 * one["test_accuracy"], 1)
            for step in steps
        ]
        lines.append(f"| {100 * here[0]['density']:.1f}% | " + " | ".join(f"{cell}%" for cell in cells) + " |")
    return "\n".join(lines)


def spread(ones: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float], digits: int) -> str:
    """Mean, least and greatest."""
    values = [value(one) for one in ones]
    if not values:
        return ""
    told = [f"{one:,.{digits}f}" for one in (statistics.fmean(values), min(values), max(values))]
    return f"{told[0]} [{told[1]}, {told[2]}]"
