"""Tickets of checkpoints that do not fit in memory."""

from __future__ import annotations

import textwrap

from _tables._format import MIB, Results, load, machine_line, number, other_work

ROWS = {
    "read twice": "reading all files twice",
    "create_magnitude_mask": "`create_magnitude_mask`",
    "cp": "`cp`, and the disk until it has all",
    "prune_checkpoint": "`prune_checkpoint`",
}


def streaming() -> str:
    """From a checkpoint on disk to its ticket, and to its pruned copy."""
    results = load("streaming")
    return f"""## From disk

A checkpoint of the shapes of Qwen2.5-14B, random normal in bfloat16, {results["file_bytes"] / 1e9:.1f} GB on a
machine with {results["machine"]["memory_bytes"] / 1e9:.0f} GB of memory: a ticket of sparsity
{results["sparsity"]} under one threshold drawn from its folder, and a pruned copy,
each in a process of its own and with nothing of the files cached. Memory is anonymous memory above what the
process took when it had the library, transformers and the kernels; that of `prune_checkpoint` begins with the
ticket loaded. "planned" is what `plan_memory` says of it beforehand.

{streaming_table(results)}

| | measured | at most |
| --- | ---: | ---: |
{bars(results)}

{once(results)}

{machine_line(results)}{other_work(results)}
"""


def streaming_table(results: Results) -> str:
    """Time, speed, bytes read and memory of each way."""
    lines = [
        "| | seconds | GB/s | read, times the files | memory | planned |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, label in ROWS.items():
        run = results["runs"][name]
        memory = (run["anonymous_peak"] - run["anonymous_before"]) / MIB
        planned = results["planned_bytes"].get(name)
        lines.append(
            f"| {label} | {run['seconds']:.1f} | {results['file_bytes'] / run['seconds'] / 1e9:.2f} "
            f"| {run['bytes_read'] / results['file_bytes']:.2f} | {number(memory, 0)} MiB "
            f"| {f'{planned / MIB:,.0f} MiB' if planned else ''} |"
        )
    return "\n".join(lines)


def once(results: Results) -> str:
    """What one read would take, and save."""
    found = results["one_read"]
    return textwrap.fill(
        "Drawing in one read would keep aside the places of what the guess leaves open. "
        f"{found['ties_share']:.2%} of the weights tie at the threshold, and a sample of a million leaves up to "
        f"{found['magnitudes']} magnitudes open: {found['aside_bytes'] / MIB:,.0f} MiB at 16 bits a place, of the "
        f"256 MiB that there are beside the mask. It would save the {results['read_ratio'] - 1:.0%} of the files "
        "that are read a second time here, where the other pages are still cached.",
        115,
    )


def bars(results: Results) -> str:
    """What was to be reached."""
    ratios, limits = results["time_ratios"], results["time_bars"]
    draw, apply = ratios["create_magnitude_mask"], ratios["prune_checkpoint"]
    return "\n".join(
        [
            f"| time of drawing, against reading twice | x {draw:.2f} | x {limits['create_magnitude_mask']} |",
            f"| time of drawing, against half of that | x {results['once_ratio']:.2f} | |",
            f"| time of applying, against `cp` | x {apply:.2f} | x {limits['prune_checkpoint']} |",
            f"| memory of drawing: the packed mask ({results['packed_mask_bytes'] / MIB:,.0f} MiB) and 256 MiB "
            f"| {results['anonymous_bytes'] / MIB:,.0f} MiB | {results['anonymous_bar'] / MIB:,.0f} MiB |",
            f"| bytes read in drawing, times the files | {results['read_ratio']:.2f} | 2 |",
        ]
    )


def quality_from_disk() -> str:
    """A ticket's quality, block by block."""
    results = load("quality_from_disk")
    return f"""## Quality from disk

The dense model and a ticket of sparsity {results["sparsity"]:.1f} on {results["tokens"]} tokens, by
`compute_lottery_ticket_quality` from the folder: the same checkpoint of {results["file_bytes"] / 1e9:.1f} GB,
each line in a process of its own and with nothing of the files cached. Memory is all anonymous memory of the
process at its peak, the ticket's {results["mask_bytes"] / 1e9:.1f} GB in it. The reader leaves the processor idle;
what the evaluation takes beyond it is two forward passes of the model. Of the embedding it reads the rows of these
tokens, which is why the files are not read whole.

{quality_table(results)}

Memory was to be {results["anonymous_bar"] / 1e9:.0f} GB at most; the time is
{results["time_ratio"]:.1f} times that of reading the files once.

{machine_line(results)}{other_work(results)}
"""


def quality_table(results: Results) -> str:
    """Reading and evaluating."""
    labels = {"read once": "reading all files once", "quality from disk": "`compute_lottery_ticket_quality`"}
    lines = ["| | seconds | read, times the files | memory |", "| --- | ---: | ---: | ---: |"]
    for name, label in labels.items():
        run = results["runs"][name]
        lines.append(
            f"| {label} | {run['seconds']:.1f} | {run['bytes_read'] / results['file_bytes']:.2f} "
            f"| {run['anonymous_peak'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)
