"""Predictions of memory beside measured peaks."""

from __future__ import annotations

from _tables._format import Results, load, machine_line


def plans() -> str:
    """`plan_memory` against peaks."""
    memory = load("memory_plan")
    return f"""## Memory, predicted and measured

`plan_memory` against the peak of the resident set, {memory["batch"]} x {memory["length"]} tokens in float32 on the
CPU, random weights, the head tied to the embedding; each peak is the mean of {memory["processes"]} fresh processes
that had run the same on a tiny model. Both sides count the weights and leave out torch's code. The bar is
{memory["bar"]:.0%}.

{plans_table(memory["rows"])}

{machine_line(memory)}
"""


def plans_table(rows: list[Results]) -> str:
    """A row for each model and operation."""
    lines = ["| model | operation | predicted | peak | off by |", "| --- | --- | ---: | ---: | ---: |"]
    for row in rows:
        cells = [
            row["model"],
            row["operation"],
            f"{row['predicted_bytes'] / 1e9:.3f} GB",
            f"{row['peak_bytes'] / 1e9:.3f} GB",
            f"{row['error']:+.1%}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
