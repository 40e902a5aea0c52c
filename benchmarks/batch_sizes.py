"""Render docs/batch-sizes.md: what `plan_memory` says of public models on usual devices. Nothing is measured.

    python benchmarks/batch_sizes.py

The tests hold the page against the library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lottery_tickets.large_models import MemoryPlan, plan_memory
from lottery_tickets.planning import shown
from lottery_tickets.planning._models import shapes_of

PAGE = Path(__file__).parent.parent / "docs" / "batch-sizes.md"
MODELS = ("SmolLM2-135M", "Qwen2.5-0.5B", "Qwen2.5-1.5B", "Llama-3.2-3B", "Llama-3.1-8B", "Qwen2.5-14B")
RESULTS = Path(__file__).parent / "results"
DEVICES = ("24GB", "80GB")
LARGE, LENGTH, BATCH = "Qwen2.5-14B", 512, 2
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "quality of a ticket": ("quality", {}),
    "Fisher": ("fisher", {}),
    "Fisher, `checkpoint_activations=True`": ("fisher", {"gradient_checkpointing": True}),
    "early-bird, SGD": ("early-bird", {}),
    "early-bird, AdamW in 8 bits": ("early-bird", {"optimizer": "adamw8bit"}),
    "early-bird, AdamW": ("early-bird", {"optimizer": "adamw"}),
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude mask, from the checkpoint's folder": ("mask", {"from_disk": True, "device": "cpu"}),
    "magnitude mask, model loaded": ("mask", {}),
    **WAYS,
    "early-bird, AdamW, all gradients held (torch's own)": ("early-bird", {"optimizer": "torch adamw"}),
    "iterative, SGD, rewinding point in `run_dir`": ("iterative", {"run_dir": True}),
}
# What was measured, in the words of these tables.
MEASURED = {
    "mask": "magnitude mask, model loaded",
    "quality": "quality of a ticket",
    "fisher": "Fisher",
    "early-bird": "early-bird, SGD",
    "iterative": "iterative, SGD, rewinding point in memory",
}
STEPS = {
    "sgd": "a training step, SGD",
    "adamw": "a training step, AdamW",
    "torch adamw": "a training step, AdamW, all gradients held (torch's own)",
}


def page() -> str:
    """The whole page, in Markdown."""
    models = {name: shapes_of(name, torch.bfloat16) for name in MODELS}
    return f"""# Batch sizes

Written by `python benchmarks/batch_sizes.py` from [`plan_memory`](memory.md): predictions for weights in bfloat16
on a device of its own, {LENGTH} tokens in a sample. There was no accelerator to run them on; what was run on a CPU
stands further down.

## The largest batch

Samples that go through the model together; "-" where not even one does.

{batches_table(models)}

For other lengths: `lottery-tickets plan MODEL --operation OPERATION --device-memory 24GB --batches`.

## From 135M to 14B

Bytes in all, {BATCH} x {LENGTH} tokens:

{totals_table(models)}

## {LARGE} on one device of 80 GB

{BATCH} x {LENGTH} tokens. Masks and sums of scores lie in the machine's own memory.

{methods_table(models[LARGE])}

## What was run of it

On a CPU, each in a fresh process: bytes predicted and measured, and how far the prediction is off. Holes that the
CPU's allocator leaves between states and gradients of different sizes are no part of predictions.

{measured_table()}

## Item by item, from 135M to 14B

{items_tables(models)}"""


def batches_table(models: dict[str, nn.Module]) -> str:
    """A row for each model and way, a column for each device."""
    lines = ["| model | operation | " + " | ".join(DEVICES) + " |", "| --- | --- |" + " ---: |" * len(DEVICES)]
    for name, model in models.items():
        for way, what in WAYS.items():
            largest = [planned(model, what, device_memory=device).largest_batch for device in DEVICES]
            cells = ["-" if not one else f"{one:,}" for one in largest]
            lines.append(f"| {name} | {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def totals_table(models: dict[str, nn.Module]) -> str:
    """A row for each way, a column for each model."""
    lines = ["| operation | " + " | ".join(models) + " |", "| --- |" + " ---: |" * len(models)]
    for way, what in METHODS.items():
        cells = [shown(planned(model, what, batch_size=BATCH)["total"]) for model in models.values()]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def methods_table(model: nn.Module) -> str:
    """A row for each way: its items, its sum, and whether that fits."""
    items = ("weights", "gradients", "optimizer", "activations", "logits", "temporaries", "total")
    lines = ["| operation | " + " | ".join(items) + " | fits | in the machine |", "| --- |" + " ---: |" * 9]
    for way, what in METHODS.items():
        plan = planned(model, what, batch_size=BATCH, device_memory="80GB")
        on_device = plan.device != "cpu"
        cells = [shown(plan[item]) if plan[item] and on_device else "" for item in items]
        cells += ["yes" if plan.fits else "no", shown(sum(plan.host.values()) if on_device else plan["total"])]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured_table() -> str:
    """Predictions beside peaks, of the same operations on smaller models, and of the one that was run in full."""
    lines = [
        "| operation | model | tokens | predicted | measured | off by |",
        "| --- | --- | ---: |" + " ---: |" * 3,
    ]
    disk, plans, steps = (results_of(name) for name in ("streaming", "memory_plan", "early_bird_memory"))
    rows: list[tuple[str, str, str, float, float]] = [
        (
            "magnitude mask, from the checkpoint's folder",
            f"shape of {LARGE}, bfloat16",
            "",
            disk["planned_bytes"]["create_magnitude_mask"],
            disk["anonymous_bytes"],
        )
    ]
    for row in plans["rows"]:
        if row["model"] == "SmolLM2-360M":
            tokens = f"{plans['batch']} x {plans['length']}"
            name = MEASURED[row["operation"]]
            rows.append((name, "SmolLM2-360M, float32", tokens, row["predicted_bytes"], row["peak_bytes"]))
    for row in steps["rows"]:
        if row["way"] in STEPS:
            model = f"Llama-shaped, {steps['weights'] / 1e9:.2f}B, {row['dtype']}"
            rows.append((STEPS[row["way"]], model, str(row["tokens"]), row["predicted_bytes"], row["peak_bytes"]))
    for name, model, tokens, predicted, peak in rows:
        cells = f"{shown(round(predicted))} | {shown(round(peak))} | {predicted / peak - 1:+.1%}"
        lines.append(f"| {name} | {model} | {tokens} | {cells} |")
    return "\n".join(lines)


def items_tables(models: dict[str, nn.Module]) -> str:
    """A table for each of some ways, a row for each model."""
    tables = []
    for way in ("quality of a ticket", "Fisher", "early-bird, SGD", "early-bird, AdamW"):
        items = ("weights", "gradients", "optimizer", "activations", "logits", "temporaries", "total")
        lines = [f"{way}:", "", "| model | " + " | ".join(items) + " |", "| --- |" + " ---: |" * len(items)]
        for name, model in models.items():
            plan = planned(model, WAYS[way], batch_size=BATCH)
            lines.append(
                f"| {name} | " + " | ".join(shown(plan[item]) if plan[item] else "" for item in items) + " |"
            )
        tables.append("\n".join(lines) + "\n")
    return "\n".join(tables)


def results_of(name: str) -> dict[str, Any]:
    """What a benchmark wrote."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def planned(model: nn.Module, what: tuple[str, dict[str, Any]], **options: Any) -> MemoryPlan:
    """One plan."""
    operation, own = what
    return plan_memory(model, operation, sequence_length=LENGTH, **{"device": "cuda", **own, **options})


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
