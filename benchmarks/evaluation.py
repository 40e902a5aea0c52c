"""What judging a ticket costs: quality of a half-pruned SmolLM2-135M against the plain dense evaluation.

    python benchmarks/evaluation.py [--quick]

Both see the same 512-token windows in float32. The text begins at its middle: the model has its opening by heart.
Time is interleaved medians; memory is the peak above the loaded model, medians of fresh processes. Bars: at most
1.15 times the dense loop's time; at most the packed mask, two of the largest prunable tensors and 64 MiB above its
memory; the weights bit for bit what they were, after an exception too.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from _common import MIB, benchmark_parser, interleaved, keep, medians, peak_bytes_in_fresh_process
from lottery_tickets import Mask, compute_lottery_ticket_quality, create_magnitude_mask, prunable_parameters
from lottery_tickets._data import model_folder, text_file

CONTEXT = 512
TEXT_START = 2_000_000
SPARSITY = 0.5
TIME_BAR = 1.15
# Where the allocator puts things differs from process to process by tens of MiB.
MEMORY_RUNS = 5
Batches = list[dict[str, torch.Tensor]]


def load_model() -> torch.nn.Module:
    """SmolLM2-135M in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=torch.float32)


def load_batches(windows: int) -> Batches:
    """Batches of one window each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    text = text_file().read_text(encoding="utf-8")[TEXT_START:][: windows * CONTEXT * 8]
    tokens = tokenizer(text, return_tensors="pt")["input_ids"][0]
    assert len(tokens) >= windows * CONTEXT, len(tokens)
    return [{"input_ids": row[None]} for row in tokens[: windows * CONTEXT].view(windows, CONTEXT)]


def dense_loss(model: torch.nn.Module, batches: Batches) -> float:
    """The plain loop: transformers' own loss, windows being of one length."""
    with torch.no_grad():
        losses = [model(**batch, labels=batch["input_ids"]).loss.item() for batch in batches]
    return sum(losses) / len(losses)


def ticket_quality(model: torch.nn.Module, mask: Mask, batches: Any, baseline: float) -> Any:
    """Ours, the dense model's loss being known."""
    return compute_lottery_ticket_quality(model, mask, batches, baseline_performance=baseline, progress=False)


def prepare_dense(windows: int) -> Callable[[], object]:
    """The dense loop, for a fresh process."""
    model, batches = load_model(), load_batches(windows)
    return lambda: dense_loss(model, batches)


def prepare_ticket(windows: int, ticket: str, baseline: float) -> Callable[[], object]:
    """Loading a ticket and measuring its quality, for a fresh process."""
    model, batches = load_model(), load_batches(windows)
    return lambda: ticket_quality(model, Mask.load(ticket), batches, baseline)


def weights_digest(model: torch.nn.Module) -> str:
    """sha256 over the bytes of all parameters and buffers."""
    state = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state.update(name.encode())
        state.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def interrupted(batches: Batches) -> Iterator[dict[str, torch.Tensor]]:
    """One good batch, then one that the model chokes on while the mask is applied."""
    yield batches[0]
    yield {"input_ids": torch.full((1, 8), 10**9)}


def measure(windows: int, repeats: int) -> dict[str, Any]:
    """All figures of this benchmark."""
    model, batches = load_model(), load_batches(windows)
    mask = create_magnitude_mask(model, SPARSITY)
    before = weights_digest(model)
    baseline = dense_loss(model, batches[:1])
    quality = ticket_quality(model, mask, batches, baseline)
    seconds = interleaved(
        {
            "dense": lambda: dense_loss(model, batches),
            "ticket": lambda: ticket_quality(model, mask, batches, baseline),
        },
        repeats,
    )
    after = weights_digest(model)
    try:
        ticket_quality(model, mask, interrupted(batches), baseline)
    except IndexError as error:
        exception = type(error).__name__
    else:
        raise AssertionError("the broken batch went through")
    after_exception = weights_digest(model)

    packed = sum(mask.packed(name).nbytes for name in mask)
    largest = max(weight.numel() * weight.element_size() for weight in prunable_parameters(model).values())
    with tempfile.TemporaryDirectory() as folder:
        ticket = str(Path(folder) / "ticket.safetensors")
        mask.save(ticket)
        peaks: dict[str, list[int]] = {"dense": [], "ticket": []}
        for _ in range(MEMORY_RUNS):
            peaks["dense"].append(peak_bytes_in_fresh_process(prepare_dense, windows))
            peaks["ticket"].append(peak_bytes_in_fresh_process(prepare_ticket, windows, ticket, baseline))
    typical, peak = medians(seconds), medians(peaks)
    return {
        "model": "SmolLM2-135M-Instruct, float32",
        "sparsity": SPARSITY,
        "windows": windows,
        "context": CONTEXT,
        "repeats": repeats,
        "ticket_loss": quality["loss"],
        "seconds": seconds,
        "median_seconds": typical,
        "time_ratio": typical["ticket"] / typical["dense"],
        "slowest_over_fastest": {name: max(values) / min(values) for name, values in seconds.items()},
        "time_bar": TIME_BAR,
        "peak_bytes": peaks,
        "median_peak_bytes": peak,
        "extra_bytes": peak["ticket"] - peak["dense"],
        "allowed_extra_bytes": packed + 2 * largest + 64 * MIB,
        "bit_identical": after == before,
        "bit_identical_after_exception": after_exception == before,
        "exception": exception,
    }


def table(results: dict[str, Any]) -> Table:
    """The results beside their bars."""
    shown = Table(title=f"{results['model']}, {results['windows']} windows of {CONTEXT} tokens")
    for heading in ("", "dense loop", "ticket quality", "against dense", "bar"):
        shown.add_column(heading, justify="right")
    times, peaks = results["median_seconds"], results["median_peak_bytes"]
    shown.add_row(
        "median time",
        f"{times['dense']:.2f} s",
        f"{times['ticket']:.2f} s",
        f"x {results['time_ratio']:.3f}",
        f"x {TIME_BAR}",
    )
    shown.add_row(
        "peak memory above the model",
        f"{peaks['dense'] / MIB:.0f} MiB",
        f"{peaks['ticket'] / MIB:.0f} MiB",
        f"{results['extra_bytes'] / MIB:+.0f} MiB",
        f"+{results['allowed_extra_bytes'] / MIB:.0f} MiB",
    )
    spread = results["slowest_over_fastest"]
    shown.add_row("  slowest / fastest round", f"{spread['dense']:.2f}", f"{spread['ticket']:.2f}", "", "")
    shown.add_row("weights bit-identical", "", str(results["bit_identical"]), "", "True")
    shown.add_row("  after an exception", "", str(results["bit_identical_after_exception"]), "", "True")
    return shown


def main() -> None:
    """Run, print, write benchmarks/results/evaluation.json."""
    given = benchmark_parser(__doc__, "two windows, two rounds").parse_args()
    results = measure(windows=2 if given.quick else 6, repeats=2 if given.quick else 7)
    console = Console()
    console.print(table(results))
    console.print(keep("evaluation", results, given))


if __name__ == "__main__":
    main()
