"""The tables of docs/deployment.md."""

from __future__ import annotations

from _tables._format import MIB, Results, load, machine_line, number, other_work

FORMS = {
    "safetensors": "zeros in place, safetensors",
    "gzip": "the same, gzip -{gzip_level}",
    "zstd": "the same, zstd -{zstd_level}",
    "kept values and ticket": "kept values and ticket",
    "kept values and ticket, zstd": "these, zstd -{zstd_level}",
    "ticket": "ticket alone",
}
TICKETS = {"dense": "dense", "0.5": "sparsity 0.5", "0.9": "sparsity 0.9", "2:4": "2:4"}
NETWORKS = {
    "dense": ("dense", "PyTorch"),
    "0.9, zeros in place": ("sparsity 0.9, zeros in place", "PyTorch"),
    "0.5, CSR": ("sparsity 0.5, `torch.sparse` CSR", "PyTorch"),
    "0.9, CSR": ("sparsity 0.9, `torch.sparse` CSR", "PyTorch"),
    "0.9, zeros in place, ONNX Runtime": ("sparsity 0.9, zeros in place", "ONNX Runtime"),
    "eight-bit weights, ONNX Runtime": ("the same, eight-bit weights", "ONNX Runtime"),
}


def disk() -> str:
    """Bytes of every form of the weights."""
    results = load("deployment")
    return f"""SmolLM2-135M in bfloat16: {results["parameters"] / 1e6:.1f} million parameters, of which {
        results["prunable"] / 1e6:.1f} million may be pruned.

{disk_table(results)}
"""


def disk_table(results: Results) -> str:
    """A row for each form, a column for each ticket."""
    dense = results["disk"]["dense"]["safetensors"]
    lines = [
        "| MiB (share of dense) | " + " | ".join(TICKETS.values()) + " |",
        "| --- |" + " ---: |" * len(TICKETS),
    ]
    for form, name in FORMS.items():
        sizes = [results["disk"][ticket].get(form) for ticket in TICKETS]
        cells = ["" if size is None else f"{size / MIB:.1f} ({size / dense:.2f})" for size in sizes]
        lines.append("| " + " | ".join([name.format(**results), *cells]) + " |")
    return "\n".join(lines)


def passes() -> str:
    """Memory and time of every way to compute, and of the structured ticket."""
    results, structured = load("deployment"), load("structured")
    prompt, one = _counts(results)
    dense = {count: min(results["seconds"][count]["dense"]) for count in (prompt, one)}
    errors = results["relative_errors"].items()
    exact = max(error for name, error in errors if not name.startswith("eight"))
    eight = max(error for name, error in errors if name.startswith("eight"))
    by_torch, by_onnx = (structured["ratios"][runtime] for runtime in ("PyTorch", "ONNX Runtime"))
    return f"""{passes_table(results)}

Times are the least of interleaved runs, over the dense model's by PyTorch: {
        number(1000 * dense[prompt], 0)
    } ms for {prompt} tokens and {number(1000 * dense[one], 0)} ms for one.
Outputs agree with those of zeros in place within {exact:.1g} of the largest, with eight-bit weights within {
        eight:.1g}.

Measured on its own, a [structured ticket](measurements.md#structured-tickets): without half of its neurons and a
third of its heads the model has {100 * structured["share_left"]:.0f}% of its parameters, takes x {
        structured["memory_ratio"]:.2f} of the peak memory, and over {structured["tokens"]}
tokens x {by_torch:.2f} of the time by PyTorch and x {by_onnx:.2f} by ONNX Runtime.

{machine_line(results)}{other_work(results)}
"""


def passes_table(results: Results) -> str:
    """A row for each network and runtime."""
    counts, held = _counts(results), results["weight_bytes"]
    lines = [
        f"| network | runtime | MiB of weights | of dense | time, {counts[0]} tokens | time, {counts[1]} token |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for key, (name, runtime) in NETWORKS.items():
        least = [{way: min(runs) for way, runs in results["seconds"][count].items()} for count in counts]
        times = [f"x {one[key] / one['dense']:.2f}" for one in least]
        cells = [name, runtime, f"{held[key] / MIB:.0f}", f"x {held[key] / held['dense']:.2f}", *times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _counts(results: Results) -> list[str]:
    """How many tokens passes were of, the longer ones first."""
    return sorted(results["seconds"], key=int, reverse=True)


def cuda() -> str:
    """2:4 on a GPU, if there was one."""
    results: Results = load("deployment")
    found = results["cuda"]
    if found is None:
        return "`benchmarks/deployment.py` measures this where there is CUDA; it has not been run on a GPU.\n"
    dense, sparse = (min(found["seconds"][name]) for name in ("dense", "2:4"))
    return (
        f"Measured on {found['device']}: x {sparse / dense:.2f} of the dense time, outputs within "
        f"{found['relative_error']:.1g} of the largest.\n"
    )
