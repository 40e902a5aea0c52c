"""What importance scores cost: Fisher, Taylor and grad_norm of SmolLM2-135M against plain training steps.

    python benchmarks/scoring.py [--quick]

All see the same 16 sequences of 128 tokens in float32, at one batch size. The plain step is forward, transformers'
own loss and `loss.backward()` for every parameter. Time is interleaved medians; memory is the peak above the
loaded model, each in a fresh process, in which everything has run once before on a few tokens, so that compiled
and cached code does not count. Bars: at most 1.35 times the plain step's time; at most its memory plus the sums'
bytes less those of the gradients that are not held, and with the sums on disk less than its memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import MIB, interleaved, machine, medians, peak_bytes_in_fresh_process, write_results
from lottery_tickets import prunable_parameters
from lottery_tickets._data import model_folder, text_file
from lottery_tickets.importance_scoring import compute_gradient_importance

SEQUENCES, LENGTH = 16, 128
TEXT_START = 2_000_000
CRITERIA = ("fisher", "taylor", "grad_norm")
TIME_BAR = 1.35
Batches = list[dict[str, torch.Tensor]]


def load_model() -> torch.nn.Module:
    """SmolLM2-135M in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


def load_batches(size: int) -> Batches:
    """The sequences, so many a batch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    text = text_file().read_text(encoding="utf-8")[TEXT_START:][: SEQUENCES * LENGTH * 8]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    rows = tokens[: SEQUENCES * LENGTH].view(SEQUENCES, LENGTH)
    return [{"input_ids": part} for part in rows.split(size)]


def plain_steps(model: torch.nn.Module, batches: Batches) -> None:
    """Forward and backward over all batches, whose gradients add up as they do for one optimiser step."""
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(**batch, labels=batch["input_ids"], use_cache=False).loss.backward()


def scores(model: torch.nn.Module, batches: Batches, criterion: str, store: str) -> object:
    """Ours."""
    return compute_gradient_importance(model, batches, criterion, store=store, progress=False)  # type: ignore[call-overload]


def prepare(what: str, store: str, size: int) -> Callable[[], object]:
    """A plain step or a criterion, for a fresh process."""
    model, batches = load_model(), load_batches(size)
    small = [{"input_ids": batches[0]["input_ids"][:1, :8]}]

    def work(data: Batches) -> object:
        return plain_steps(model, data) if what == "plain" else scores(model, data, what, store)

    work(small)
    model.zero_grad(set_to_none=True)
    return lambda: work(batches)


def measure(size: int, repeats: int, criteria: tuple[str, ...]) -> dict[str, Any]:
    """All figures at one batch size."""
    model, batches = load_model(), load_batches(size)
    work: dict[str, Callable[[], object]] = {"plain": lambda: plain_steps(model, batches)}
    for criterion in criteria:
        work[criterion] = lambda criterion=criterion: scores(model, batches, criterion, "cpu")
        work[f"{criterion}, disk"] = lambda criterion=criterion: scores(model, batches, criterion, "disk")
    for function in work.values():
        function()
    seconds = interleaved(work, repeats)
    typical = medians(seconds)
    peaks = {"plain": peak_bytes_in_fresh_process(prepare, "plain", "", size)}
    for criterion in criteria:
        peaks[criterion] = peak_bytes_in_fresh_process(prepare, criterion, "cpu", size)
        peaks[f"{criterion}, disk"] = peak_bytes_in_fresh_process(prepare, criterion, "disk", size)
    sums = sum(weight.numel() * 4 for weight in prunable_parameters(model).values())
    gradients = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return {
        "model": "SmolLM2-135M-Instruct, float32",
        "sequences": SEQUENCES,
        "length": LENGTH,
        "batch_size": size,
        "repeats": repeats,
        "seconds": seconds,
        "median_seconds": typical,
        "time_ratios": {name: value / typical["plain"] for name, value in typical.items()},
        "slowest_over_fastest": {name: max(values) / min(values) for name, values in seconds.items()},
        "time_bar": TIME_BAR,
        "peak_bytes": peaks,
        "sums_bytes": sums,
        "gradients_bytes": gradients,
        "allowed_peak_bytes": {
            name: peaks["plain"] + (0 if name.endswith("disk") else sums - gradients)
            for name in peaks
            if name != "plain"
        },
    }


def table(results: dict[str, Any]) -> Table:
    """The results beside their bars."""
    batching = f"{SEQUENCES} sequences of {LENGTH} tokens, {results['batch_size']} a batch"
    shown = Table(title=f"{results['model']}, {batching}")
    for heading in ("", "time", "against plain", "bar", "slowest / fastest", "peak memory", "bar"):
        shown.add_column(heading, justify="right")
    for name, seconds in results["median_seconds"].items():
        allowed = results["allowed_peak_bytes"].get(name)
        shown.add_row(
            name,
            f"{seconds:.2f} s",
            f"x {results['time_ratios'][name]:.3f}",
            "" if name == "plain" else f"x {TIME_BAR}",
            f"{results['slowest_over_fastest'][name]:.2f}",
            f"{results['peak_bytes'][name] / MIB:.0f} MiB",
            "" if allowed is None else f"{allowed / MIB:.0f} MiB",
        )
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/scoring.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="Fisher only, one round, nothing written")
    quick = parser.parse_args().quick
    console = Console()
    sizes, repeats = ((16,), 1) if quick else ((16, 4), 5)
    results = {f"batches of {size}": measure(size, repeats, CRITERIA[:1] if quick else CRITERIA) for size in sizes}
    for one in results.values():
        console.print(table(one))
    if quick:
        console.print(machine())
    else:
        console.print(f"written to {write_results('scoring', results)}")


if __name__ == "__main__":
    main()
