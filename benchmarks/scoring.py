"""What importance scores cost: Fisher, Taylor and grad_norm of SmolLM2-135M against plain training steps.

    python benchmarks/scoring.py [--quick] [--batch-size N] [--only time|memory]

All see the same 16 sequences of 128 tokens in float32, at one batch size. The plain step is forward, transformers'
own loss and `loss.backward()` for every parameter. Time is interleaved medians; memory is the peak above the
loaded model, the median of fresh processes. Everything has run once before on a few tokens, so that compiled and
cached code does not count. Bars: at most 1.35 times the plain step's time; at most its memory plus the sums'
bytes less those of the gradients that are not held, and with the sums on disk less than its memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import (
    MIB,
    RESULTS,
    benchmark_parser,
    interleaved,
    keep,
    machine,
    medians,
    peak_bytes_in_fresh_process,
)
from lottery_tickets import prunable_parameters
from lottery_tickets._data import model_folder, text_file
from lottery_tickets.importance_scoring import compute_gradient_importance

SEQUENCES, QUICK_SEQUENCES, LENGTH = 16, 4, 128
TEXT_START = 2_000_000
CRITERIA = ("fisher", "taylor", "grad_norm")
TIME_BAR = 1.35
Batches = list[dict[str, torch.Tensor]]


def load_model() -> torch.nn.Module:
    """SmolLM2-135M in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


def load_batches(sequences: int, size: int) -> Batches:
    """So many sequences, so many of them a batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    text = text_file().read_text(encoding="utf-8")[TEXT_START:][: sequences * LENGTH * 8]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    rows = tokens[: sequences * LENGTH].view(sequences, LENGTH)
    return [{"input_ids": part} for part in rows.split(size)]


def plain_steps(model: torch.nn.Module, batches: Batches) -> None:
    """Forward and backward over all batches, whose gradients add up as they do for one optimiser step."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()


def scores(model: torch.nn.Module, batches: Batches, criterion: str, store: str) -> object:
    """Ours."""
    return compute_gradient_importance(model, batches, criterion, store=store, progress=False)  # type: ignore[call-overload]


def few_tokens(batches: Batches) -> Batches:
    """What everything is run on beforehand."""
    return [{"input_ids": batches[0]["input_ids"][:1, :8]}]


def prepare(what: str, store: str, sequences: int, size: int) -> Callable[[], object]:
    """A plain step or a criterion, for a fresh process."""
    model, batches = load_model(), load_batches(sequences, size)

    def work(data: Batches) -> object:
        return plain_steps(model, data) if what == "plain" else scores(model, data, what, store)

    work(few_tokens(batches))
    model.zero_grad(set_to_none=True)
    return lambda: work(batches)


def measure_time(sequences: int, size: int, repeats: int, criteria: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of everything, taking turns."""
    model, batches = load_model(), load_batches(sequences, size)
    work: dict[str, Callable[[Batches], object]] = {"plain": lambda data: plain_steps(model, data)}
    for criterion in criteria:
        work[criterion] = lambda data, criterion=criterion: scores(model, data, criterion, "cpu")
        work[f"{criterion}, disk"] = lambda data, criterion=criterion: scores(model, data, criterion, "disk")
    for function in work.values():
        function(few_tokens(batches))
    seconds = interleaved({name: partial(function, batches) for name, function in work.items()}, repeats)
    typical = medians(seconds)
    return {
        "machine_when_timed": machine(),
        "repeats": repeats,
        "seconds": seconds,
        "median_seconds": typical,
        "time_ratios": {name: value / typical["plain"] for name, value in typical.items()},
        "slowest_over_fastest": {name: max(values) / min(values) for name, values in seconds.items()},
        "time_bar": TIME_BAR,
    }


def measure_memory(sequences: int, size: int, processes: int, criteria: tuple[str, ...]) -> dict[str, Any]:
    """Peaks, medians over processes: what an allocator keeps varies from one to the next."""
    runs = {"plain": ("plain", ""), **{one: (one, "cpu") for one in criteria}}
    runs |= {f"{one}, disk": (one, "disk") for one in criteria}
    peaks = {
        name: [peak_bytes_in_fresh_process(prepare, *run, sequences, size) for _ in range(processes)]
        for name, run in runs.items()
    }
    typical = medians(peaks)
    model = load_model()
    sums = sum(weight.numel() * 4 for weight in prunable_parameters(model).values())
    gradients = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {
        "processes": processes,
        "peak_bytes": peaks,
        "median_peak_bytes": typical,
        "sums_bytes": sums,
        "gradients_bytes": gradients,
        "allowed_peak_bytes": {
            name: typical["plain"] + (0 if name.endswith("disk") else sums - gradients)
            for name in typical
            if name != "plain"
        },
    }


def table(results: dict[str, Any]) -> Table:
    """The results beside their bars."""
    batching = f"{results['sequences']} sequences of {LENGTH} tokens, {results['batch_size']} a batch"
    shown = Table(title=f"{results['model']}, {batching}")
    for heading in ("", "time", "against plain", "bar", "slowest / fastest", "peak memory", "bar"):
        shown.add_column(heading, justify="right")
    for name, seconds in results["median_seconds"].items():
        allowed = results["allowed_peak_bytes"].get(name)
        shown.add_row(
            name,
            f"{seconds:.2f} s",
            f"x {results['time_ratios'][name]:.3f}",
            f"x {TIME_BAR}" if name in CRITERIA else "",
            f"{results['slowest_over_fastest'][name]:.2f}",
            f"{results['median_peak_bytes'][name] / MIB:.0f} MiB",
            "" if allowed is None else f"{allowed / MIB:.0f} MiB",
        )
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/scoring.json."""
    parser = benchmark_parser(__doc__, "Fisher only, a quarter of the sequences, one round")
    parser.add_argument("--batch-size", type=int, default=SEQUENCES, help="sequences a batch")
    parser.add_argument("--only", choices=("time", "memory"), help="measure this half anew, keep the other")
    chosen = parser.parse_args()
    console = Console()
    repeats, criteria = (1, CRITERIA[:1]) if chosen.quick else (3, CRITERIA)
    sequences = QUICK_SEQUENCES if chosen.quick else SEQUENCES
    kept = RESULTS / "scoring.json"
    results = json.loads(kept.read_text()) if chosen.only and kept.exists() else {}
    results |= {
        "model": "SmolLM2-135M-Instruct, float32",
        "sequences": sequences,
        "length": LENGTH,
        "batch_size": chosen.batch_size,
    }
    if chosen.only != "memory":
        results |= measure_time(sequences, chosen.batch_size, repeats, criteria)
    if chosen.only != "time":
        results |= measure_memory(sequences, chosen.batch_size, repeats, criteria)
    if {"median_seconds", "median_peak_bytes"} <= results.keys():
        console.print(table(results))
    measured = {key: value for key, value in results.items() if key not in ("date", "machine")}
    console.print(keep("scoring", measured, chosen))


if __name__ == "__main__":
    main()
