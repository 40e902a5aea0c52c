"""Render docs/measurements.md from benchmarks/results/.

    python benchmarks/tables.py

The tests hold the page against the results, so no figure in it stands anywhere else.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parent.parent / "docs" / "measurements.md"
OURS = "create_magnitude_mask"
READ = "read pass"
MIB = 1 << 20
GIB = 1 << 30

Results = dict[str, Any]


def page() -> str:
    """The whole page, in Markdown."""
    names = ("selection", "evaluation", "criteria", "rank_correlation", "early_bird_check", "early_bird_memory")
    selection, evaluation, criteria, ranks, check, training = (load(name) for name in names)
    dense = criteria["dense"]["perplexity"]
    return f"""# Measurements

Written by `python benchmarks/tables.py` from `benchmarks/results/`, which `make bench` fills. Ratios travel
between machines better than seconds do.

## From weights to mask

`create_magnitude_mask` at sparsity {selection["sparsity"]}, from weights over a hundred tensors to the finished
mask, against what a user would pick instead; the peers below the first only find a threshold. The unit of time is
one parallel read pass over the same bytes in the same process; times are medians of interleaved runs. Memory is
what the resident set rises above the weights, each figure from a process of its own; the peers' at the smallest
size.

{selection_table(selection)}

Ours rises by N / 8 bytes and a constant of at most 64 MiB:

{memory_table(selection)}

{machine_line(selection)}

## Judging a ticket

`compute_lottery_ticket_quality` of a ticket of {evaluation["model"]} at sparsity {evaluation["sparsity"]}, the
dense loss being known, against the plain loop of the dense model over the same {evaluation["windows"]} windows of
{evaluation["context"]} tokens.

{evaluation_table(evaluation)}

{machine_line(evaluation)}

## Criteria beside each other

Tickets of {criteria["model"]}, judged on the same {criteria["windows"]} windows of {criteria["context"]}
tokens from the middle of the text. Scores come from {criteria["samples"]} sequences of
{criteria["calibration_context"]} tokens from another part. "global" is one threshold for all weights, "layer" one
for each tensor, "row" one for each output row, as the paper of wanda has it; "magnitude+fisher" adds ranks.
Perplexity, dense {number(dense)}:

{perplexity_table(criteria)}

Wanda lies far below magnitude, as its paper has it, within rows, which is what its scores are made for: between
tensors they do not compare. obd and taylor weigh a gradient by the weight that would go; fisher and grad_norm do
not, so they rank how far the loss follows a weight, not what its removal costs, and alone they prune badly. snip
takes the magnitude after the mean over samples, where gradients cancel.

With their {criteria["confidence"]:.0%} intervals over windows, and with what they cost: seconds, of which those of
scoring come first and serve every row of a criterion, those of drawing second; and how far the resident memory of
the process rose above the loaded model, the scores themselves being four bytes a weight. GraSP and SynFlow cost
the most and are left out; `python benchmarks/criteria.py --all` takes them in.

{criteria_table(criteria)}

{machine_line(criteria)}

## Rank correlation by buckets

`MagnitudeRanks` holds one byte a weight and knows a magnitude to one of 256 ranks; Spearman's correlation of the
magnitudes themselves comes from scipy, which sorts them. SmolLM2 is the linear layers of its first blocks, beside
themselves with Gaussian noise of a share of each tensor's standard deviation; LeNet-300-100 is trained on MNIST
digits by SGD and compared from one epoch to the next.

{agreement_table(ranks)}

## A check for early birds

Each part on {ranks["check"]["numel"] // 10**6}M random weights in float32 at
sparsity {ranks["check"]["sparsity"]}, medians; the unit is one parallel read pass over them. Movement looks at a
sample, so its time does not grow with the model.

{check_table(ranks)}

{machine_line(ranks)}

All of it as `compute_early_bird_tickets` does it at a check of {check["weights"]:,} weights in {check["dtype"]} at
sparsity {check["sparsity"]}, against an epoch of {check["batches"]} batches of {check["batch_size"]} MNIST digits,
which takes {check["epoch_seconds"]:.0f} s of SGD (told from {check["trained_batches"]} of the batches):

{epoch_table(check)}

{machine_line(check)}

## Training in little memory

One step of a Llama-shaped model of {training["weights"] / 1e9:.2f}B random weights, each way in a fresh process:
peak of the resident set over the bytes of the weights. Ours step inside the backward pass, make activations again
on the way back and take the loss in chunks; torch's are the plain loop with transformers' own loss. The bar for
plain SGD is {training["ratio_bar"]}. "predicted" is what `training_bytes` says before training; it knows nothing
of the holes that the CPU's allocator leaves between tensors, most where new states come between gradients that go.

{training_table(training)}

Predicted for the shape of Qwen2.5-14B in bfloat16 on a device of its own, {training["qwen_batch"]} x
{training["qwen_length"]} tokens, in GB of 10^9 bytes; of the moments (at the loss, in a block, at the embedding)
only the largest counts. The bar for plain SGD is {training["qwen_bar_bytes"] / 1e9:.0f} GB:

{prediction_table(training)}

{machine_line(training)}
"""


def selection_table(results: Results) -> str:
    """Time and memory of every method, by size and data type."""
    lines = [
        "| weights | dtype | method | seconds | read passes | times ours | extra bytes a weight |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        seconds = row["median_seconds"]
        read, ours = seconds[READ], seconds[OURS]
        for name in seconds:
            peak = row["peak_bytes"].get(name)
            cells = [
                row["size"],
                row["dtype"],
                name,
                f"{seconds[name]:.3f}",
                f"{seconds[name] / read:.1f}",
                f"{seconds[name] / ours:.1f}",
                "" if peak is None else f"{peak / row['numel']:.2f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
        for name, needed in row["bytes_that_do_not_fit"].items():
            lines.append(f"| {row['size']} | {row['dtype']} | {name} | needs {needed / GIB:.0f} GiB | | | |")
    return "\n".join(lines)


def memory_table(results: Results) -> str:
    """What ours took beside what it may take, at every size."""
    return "\n".join(
        [
            "| weights | dtype | peak above the weights | N / 8 + 64 MiB |",
            "| ---: | --- | ---: | ---: |",
            *(
                f"| {row['size']} | {row['dtype']} | {row['peak_bytes'][OURS] / MIB:.0f} MiB "
                f"| {row['allowed_peak_bytes'] / MIB:.0f} MiB |"
                for row in results["rows"]
            ),
        ]
    )


def evaluation_table(results: Results) -> str:
    """Time and memory beside the bars."""
    seconds, peaks, ratio = results["median_seconds"], results["median_peak_bytes"], results["time_ratio"]
    return "\n".join(
        [
            "| | dense loop | ticket quality | against dense | at most |",
            "| --- | ---: | ---: | ---: | ---: |",
            f"| median time | {seconds['dense']:.2f} s | {seconds['ticket']:.2f} s | x {ratio:.3f} "
            f"| x {results['time_bar']} |",
            f"| peak memory above the model | {peaks['dense'] / MIB:.0f} MiB | {peaks['ticket'] / MIB:.0f} MiB "
            f"| {results['extra_bytes'] / MIB:+.0f} MiB | +{results['allowed_extra_bytes'] / MIB:.0f} MiB |",
            f"| weights bit-identical afterwards | | {yes(results['bit_identical'])} | | |",
            f"| after an exception inside | | {yes(results['bit_identical_after_exception'])} | | |",
        ]
    )


def perplexity_table(results: Results) -> str:
    """A row for each criterion, a column for each way to spread and each sparsity."""
    found = {(row["criterion"], place(row)): row["quality"]["perplexity"] for row in results["rows"]}
    criteria, places = (list(dict.fromkeys(key[part] for key in found)) for part in (0, 1))
    lines = ["| criterion | ranks by | " + " | ".join(places) + " |", "| --- | --- |" + " ---: |" * len(places)]
    for criterion in criteria:
        cells = [number(found[criterion, one]) if (criterion, one) in found else "" for one in places]
        about = results["ranks_by"][criterion].replace("|", "\\|")
        lines.append(f"| {criterion} | {about} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def place(row: Results) -> str:
    """Heading of the column that a row's perplexity stands in."""
    target = row["target_sparsity"]
    return str(row["spread"]) if target is None else f"{row['spread']} {target}"


def criteria_table(results: Results) -> str:
    """A row for each ticket, with intervals and costs."""
    lines = [
        "| criterion | spread | sparsity | perplexity | retention | seconds | peak memory |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        quality, peak = row["quality"], row["peak_bytes"]
        cells = [
            row["criterion"],
            row["spread"],
            f"{quality['sparsity']:.3f}",
            interval(quality["perplexity"], quality["perplexity_interval"], 2),
            interval(quality["performance_retention"], quality["retention_interval"], 3),
            f"{row['seconds_scoring']:.1f} + {row['seconds_drawing']:.1f}",
            "" if peak is None else f"{peak / MIB:.0f} MiB",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def agreement_table(results: Results) -> str:
    """A row for each pair of weights: both correlations, and what they took."""
    lines = [
        "| weights | number | exact | by buckets | difference | seconds, exact | seconds | bytes a weight |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["agreement"]:
        cells = [
            row["case"],
            f"{row['numel']:,}",
            f"{row['exact']:.6f}",
            f"{row['bucketed']:.6f}",
            f"{row['bucketed'] - row['exact']:+.1e}",
            f"{row['exact_seconds']:.2f}",
            f"{row['seconds']:.3f}",
            f"{row['bytes_a_weight']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check_table(results: Results) -> str:
    """A row for each part of a check."""
    seconds = results["check"]["median_seconds"]
    lines = ["| part | seconds | read passes |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {taken:.3f} | {taken / seconds[READ]:.1f} |" for name, taken in seconds.items()]
    return "\n".join(lines)


def epoch_table(results: Results) -> str:
    """A row for each criterion, beside the bar."""
    lines = ["| criterion | median check | share of the epoch | at most |", "| --- | ---: | ---: | ---: |"]
    for name, seconds in results["median_check_seconds"].items():
        bar = f"{results['bar']:.0%}" if name == "window" else ""
        lines.append(f"| {name} | {seconds:.2f} s | {results['ratios'][name]:.2%} | {bar} |")
    return "\n".join(lines)


def training_table(results: Results) -> str:
    """Measured and predicted peaks over the weights."""
    lines = [
        "| weights | tokens | way | peak | over the weights | predicted |",
        "| --- | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        cells = [
            row["dtype"],
            str(row["tokens"]),
            row["way"],
            f"{row['peak_bytes'] / 1e9:.2f} GB",
            f"x {row['ratio']:.2f}",
            f"x {row['predicted_bytes'] / row['weights_bytes']:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def prediction_table(results: Results) -> str:
    """A row for each item, a column for each way of training."""
    ways = results["qwen"]
    moments = ("throughout", "at_the_loss", "in_a_block", "at_the_embedding")
    items = list(dict.fromkeys((moment, name) for moment in moments for row in ways for name in row[moment]))
    lines = ["| item | " + " | ".join(row["way"] for row in ways) + " |", "| --- |" + " ---: |" * len(ways)]
    for moment, name in items:
        cells = [f"{row[moment][name] / 1e9:.2f}" if row[moment].get(name) else "" for row in ways]
        if any(cells):
            lines.append(f"| {moment.replace('_', ' ')}: {name} | " + " | ".join(cells) + " |")
    lines.append("| update | " + " | ".join(f"{row['update'] / 1e9:.2f}" for row in ways) + " |")
    lines.append("| **peak** | " + " | ".join(f"**{row['peak'] / 1e9:.1f}**" for row in ways) + " |")
    return "\n".join(lines)


def interval(value: float, bounds: list[float], digits: int) -> str:
    """A figure and its interval."""
    return f"{number(value, digits)} [{number(bounds[0], digits)}, {number(bounds[1], digits)}]"


def number(value: float, digits: int = 2) -> str:
    """A figure, with digits after the point while they say something."""
    return f"{value:,.{digits}f}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.1e}"


def machine_line(results: Results) -> str:
    """Where and with what it was measured."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    return (
        f"{results['date'][:10]}, {machine['processor']}, {machine['torch_threads']} threads, "
        f"{machine['memory_bytes'] / GIB:.0f} GiB, Python {machine['python']}, {versions}."
    )


def yes(value: bool) -> str:
    """A word for a truth value."""
    return "yes" if value else "no"


def load(name: str) -> Results:
    """One benchmark's results."""
    results: Results = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return results


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
