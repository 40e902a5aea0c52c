"""`plan_memory` against measured peaks: five operations on models of three sizes, each in a fresh process.

    python benchmarks/memory_plan.py [--model NAME | --others] [--quick | --predict]

Random weights in float32 at the shapes of small decoders, on the CPU. A peak is of the resident set above the
loaded model, plus the bytes of its weights, so that both sides speak of the same total; code and its libraries,
loaded by the same operation on a tiny model beforehand, do not count. Bar: predictions within 10% of the mean of
some processes. Of other architectures activations are an estimate from a run on the meta device; how good it is
`--others` measures, in one process each and without a bar. `--model` measures one of the models. Rows of others in
the results stay as they are. `--predict` measures nothing and predicts anew beside the peaks that are there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from _common import RESULTS, benchmark_parser, keep, peak_bytes_in_fresh_process
from lottery_tickets import (
    Mask,
    compute_early_bird_tickets,
    compute_iterative_magnitude_pruning,
    compute_lottery_ticket_quality,
    create_magnitude_mask,
)
from lottery_tickets.importance_scoring import compute_fisher_importance
from lottery_tickets.large_models import MemoryPlan, plan_memory

BATCH, LENGTH, PROCESSES, BAR = 2, 128, 2, 0.1
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "Llama-shaped, 40M": {
        "vocab_size": 16384,
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    # huggingface.co/HuggingFaceTB/SmolLM2-135M and SmolLM2-360M, config.json
    "SmolLM2-135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "SmolLM2-360M": {
        "vocab_size": 49152,
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
}
# Published shapes of other architectures, in transformers' words; the smallest of each.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2": ("GPT2LMHeadModel", {}),
    "BERT-base": ("BertForMaskedLM", {}),
    "ViT-base": ("ViTForImageClassification", {}),
}
OTHER_OPERATIONS = ("quality", "fisher", "early-bird")
MODELS = [name for name in SIZES if name != "tiny"]
OPERATIONS = ("mask", "quality", "fisher", "early-bird", "iterative")


def model_of(name: str) -> nn.Module:
    """Random weights; of a decoder, the head tied to the embedding."""
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    if name.removeprefix("tiny ") in OTHERS:
        architecture, sizes = OTHERS[name.removeprefix("tiny ")]
        made = getattr(transformers, architecture)
        if name.startswith("tiny "):
            sizes = dict.fromkeys(("num_hidden_layers", "n_layer"), 1)
        torch.manual_seed(0)
        return made._from_config(made.config_class(**sizes), dtype=torch.float32)
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZES[name], tie_word_embeddings=True), dtype=torch.float32)


def run(operation: str, model: nn.Module, batch: dict[str, torch.Tensor], mask: Mask) -> object:
    """One operation, as a user would call it."""
    if operation == "mask":
        return create_magnitude_mask(model, 0.9, progress=False)
    if operation == "quality":
        return compute_lottery_ticket_quality(model, mask, [batch], progress=False)
    if operation == "fisher":
        return compute_fisher_importance(model, [batch], progress=False)
    if operation == "early-bird":
        return compute_early_bird_tickets(model, [batch], max_epochs=1, progress=False)
    return compute_iterative_magnitude_pruning(model, [batch], 0.5, 1, epochs=1, progress=False)


def prepare(operation: str, name: str) -> Callable[[], object]:
    """The model in memory, and all code loaded."""
    torch.set_num_threads(2)
    for size in (f"tiny {name}" if name in OTHERS else "tiny", name):
        model, batch = model_of(size), batch_of(name)
        mask = create_magnitude_mask(model, 0.5, progress=False) if operation == "quality" else None
        if size != name:
            run(operation, model, batch, mask)
    return lambda: run(operation, model, batch, mask)


def batch_of(name: str) -> dict[str, torch.Tensor]:
    """Words, or images."""
    if name.startswith("ViT"):
        return {"pixel_values": torch.zeros(BATCH, 3, 224, 224), "labels": torch.zeros(BATCH, dtype=torch.int64)}
    ids = torch.arange(BATCH * LENGTH).remainder(64).view(BATCH, LENGTH)
    return {"input_ids": ids, "labels": ids}


def measured(name: str, processes: int) -> list[dict[str, Any]]:
    """A row for each operation."""
    rows = []
    for operation in OTHER_OPERATIONS if name in OTHERS else OPERATIONS:
        plan = planned(name, operation)
        # What is there when the operation is called: weights, and the mask that is judged.
        loaded = plan["weights"] + (plan["mask"] if operation == "quality" else 0)
        peaks = [loaded + peak_bytes_in_fresh_process(prepare, operation, name) for _ in range(processes)]
        rows.append({"model": name, "operation": operation, "peaks_bytes": peaks, **compared(plan, peaks)})
    return rows


def planned(name: str, operation: str) -> MemoryPlan:
    """What is predicted."""
    with torch.device("meta"):
        shapes = model_of(name)
    return plan_memory(shapes, operation, batch_size=BATCH, sequence_length=LENGTH, device="cpu")


def compared(plan: MemoryPlan, peaks: list[int]) -> dict[str, Any]:
    """A prediction beside measured peaks."""
    peak = statistics.mean(peaks)
    items = {item: count for item, count in plan.items() if count and item != "total"}
    return {
        "peak_bytes": peak,
        "predicted_bytes": plan["total"],
        "items": items,
        "turns_bytes": plan.turns,
        "error": plan["total"] / peak - 1,
    }


def table(rows: list[dict[str, Any]]) -> Table:
    """Predictions beside peaks."""
    shown = Table(title=f"{BATCH} x {LENGTH} tokens in float32; bar {BAR:.0%}")
    for heading in ("model", "operation", "predicted", "peak", "off by"):
        shown.add_column(heading, justify="right")
    for row in rows:
        predicted, peak = (f"{row[key] / 1e9:.3f} GB" for key in ("predicted_bytes", "peak_bytes"))
        shown.add_row(row["model"], row["operation"], predicted, peak, f"{row['error']:+.1%}")
    return shown


def predict_again(path: Path) -> list[dict[str, Any]]:
    """New predictions in the results, whose peaks, date and machine stay."""
    results = json.loads(path.read_text(encoding="utf-8"))
    for row in [*results["rows"], *results["others"]]:
        row.update(compared(planned(row["model"], row["operation"]), row["peaks_bytes"]))
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return [*results["rows"], *results["others"]]


def main() -> None:
    """Run, print, write benchmarks/results/memory_plan.json."""
    parser = benchmark_parser(__doc__, "the smallest model, one process each")
    parser.add_argument("--model", choices=MODELS, help="only this one; the rows of others stay")
    parser.add_argument("--others", action="store_true", help="other architectures, instead of these")
    parser.add_argument("--predict", action="store_true", help="predict again beside the peaks that are there")
    arguments = parser.parse_args()
    console, path = Console(), RESULTS / "memory_plan.json"
    if arguments.predict:
        console.print(table(predict_again(path)))
        return
    names = [arguments.model] if arguments.model else list(OTHERS) if arguments.others else MODELS
    if arguments.quick:
        names = names[:1]
    rows = [
        row for name in names for row in measured(name, 1 if arguments.quick or arguments.others else PROCESSES)
    ]
    console.print(table(rows))
    old: dict[str, Any] = {"rows": [], "others": []}
    if path.exists() and not arguments.quick:
        old = json.loads(path.read_text(encoding="utf-8"))
    if arguments.others:
        old["others"] = rows
    else:
        old["rows"] = [row for row in old["rows"] if row["model"] not in names] + rows
        old["rows"].sort(key=lambda row: MODELS.index(row["model"]))
    processes = 1 if arguments.quick else PROCESSES
    results = {"batch": BATCH, "length": LENGTH, "processes": processes, "bar": BAR}
    results |= {"rows": old["rows"], "others": old["others"]}
    console.print(keep("memory_plan", results, arguments))


if __name__ == "__main__":
    main()
