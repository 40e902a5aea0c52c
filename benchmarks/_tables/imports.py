"""What importing costs."""

from __future__ import annotations

from _tables._format import load, machine_line, other_work


def imports() -> str:
    """Above torch, and of the command line."""
    results = load("import_time")
    lines = ["| after `import torch` | seconds | modules more |", "| --- | ---: | ---: |"]
    for row in results["rows"]:
        heavy = f", {', '.join(row['heavy'])} among them" if row["heavy"] else ""
        lines.append(f"| {row['import']} | {row['median_seconds']:.2f} | {row['modules']}{heavy} |")
    commands = ["| process, from its start to its end | seconds |", "| --- | ---: |"]
    for name, seconds in results["median_process_seconds"].items():
        commands.append(f"| {name} | {seconds:.2f} |")
    table, processes = "\n".join(lines), "\n".join(commands)
    return f"""## Import

What loading the library takes after torch, whose own import takes {results["torch_seconds"]:.2f} s; medians of
{results["repeats"]} fresh processes each, taking turns. numba, scipy and transformers are loaded where they are
used.

{table}

{processes}

{machine_line(results)}{other_work(results)}
"""
