"""What importing costs."""

from __future__ import annotations

from _tables._format import Results, load, machine_line, other_work


def imports() -> str:
    """Above torch, and of the command line."""
    results = load("import_time")
    return f"""## Import

What loading the library takes after torch, whose own import takes {results["torch_seconds"]:.2f} s; medians of
{results["repeats"]} fresh processes each, taking turns. numba, scipy and transformers are loaded where they are
used.

{modules_table(results)}

{processes_table(results)}

{machine_line(results)}{other_work(results)}
"""


def modules_table(results: Results) -> str:
    """What each import loads above torch."""
    lines = ["| after `import torch` | seconds | modules more |", "| --- | ---: | ---: |"]
    for row in results["rows"]:
        heavy = f", {', '.join(row['heavy'])} among them" if row["heavy"] else ""
        lines.append(f"| {row['import']} | {row['median_seconds']:.2f} | {row['modules']}{heavy} |")
    return "\n".join(lines)


def processes_table(results: Results) -> str:
    """Whole processes."""
    lines = ["| process, from its start to its end | seconds |", "| --- | ---: |"]
    for name, seconds in results["median_process_seconds"].items():
        lines.append(f"| {name} | {seconds:.2f} |")
    return "\n".join(lines)
