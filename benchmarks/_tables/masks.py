"""Selection and evaluation: what a mask costs, and what judging it does."""

from __future__ import annotations

from _tables._format import GIB, MIB, READ, Results, load, machine_line, yes

OURS = "create_magnitude_mask"


def selection() -> str:
    """From weights to mask."""
    selection = load("selection")
    return f"""## From weights to mask

`create_magnitude_mask` at sparsity {selection["sparsity"]}, from weights over a hundred tensors to the finished
mask, against what a user would pick instead; the peers below the first only find a threshold. The unit of time is
one parallel read pass over the same bytes in the same process; times are medians of interleaved runs. Memory is
what the resident set rises above the weights, each figure from a process of its own; the peers' at the smallest
size.

{selection_table(selection)}

Ours rises by N / 8 bytes and a constant of at most 64 MiB:

{memory_table(selection)}

{machine_line(selection)}
"""


def evaluation() -> str:
    """Judging a ticket."""
    evaluation = load("evaluation")
    return f"""## Judging a ticket

`compute_lottery_ticket_quality` of a ticket of {evaluation["model"]} at sparsity {evaluation["sparsity"]}, the
dense loss being known, against the plain loop of the dense model over the same {evaluation["windows"]} windows of
{evaluation["context"]} tokens.

{evaluation_table(evaluation)}

{machine_line(evaluation)}
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
