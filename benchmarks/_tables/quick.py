"""docs/measurements-quick.md: the tables of every benchmark's quick form, from one file."""

from __future__ import annotations

from collections.abc import Callable

from _tables import (
    birds,
    deployment,
    disk,
    imports,
    iterative,
    masks,
    planning,
    ranks,
    reproduction,
    scores,
    units,
)
from _tables._format import Results, load, machine_line, other_work

Table = Callable[[Results], str]
# In the words of the page of full measurements, whose headings these are too.
TABLES: dict[str, tuple[str, tuple[Table, ...]]] = {
    "selection": ("From weights to mask", (masks.selection_table, masks.memory_table)),
    "streaming": ("From disk", (disk.streaming_table,)),
    "quality_from_disk": ("Quality from disk", (disk.quality_table,)),
    "distributed": ("On several ranks", (ranks.ranks_table,)),
    "evaluation": ("Judging a ticket", (masks.evaluation_table,)),
    "scoring": ("Scores from gradients", (scores.scoring_table,)),
    "criteria": ("Criteria beside each other", (scores.criteria_table,)),
    "restoring": ("Why the smaller ticket can be the worse one", (scores.restoring_table,)),
    "early_bird_optimizers": (
        "Do optimizers find the same ticket?",
        (birds.optimizers_table, birds.accuracy_table),
    ),
    "early_bird_memory": ("Training in little memory", (birds.training_table,)),
    "early_bird_check": ("A check for early birds", (birds.epoch_table,)),
    "rank_correlation": ("Rank correlation by buckets", (birds.agreement_table, birds.parts_table)),
    "imp": ("Iterative magnitude pruning", (iterative.table,)),
    "reproduce": (
        "The papers, again",
        (
            lambda found: reproduction.lenet_table(found["lenet"]),
            lambda found: reproduction.barrier_table(found["cnn"]),
            lambda found: reproduction.cnn_table(found["cnn"]),
        ),
    ),
    "structured": ("Structured tickets", (units.structured_table,)),
    "early_bird_channels": ("Early birds of channels", (units.channels_table,)),
    "deployment": ("Production deployment", (deployment.disk_table, deployment.passes_table)),
    "import_time": ("Import", (imports.modules_table, imports.processes_table)),
    "memory_plan": ("Memory, predicted and measured", (lambda found: planning.plans_table(found["rows"]),)),
}


def page() -> str:
    """The whole page, in Markdown."""
    results = load("run_all")
    benchmarks: dict[str, Results] = results["benchmarks"]
    minutes = sum(one["seconds"] for one in benchmarks.values()) / 60
    sections = [section(name, one) for name, one in benchmarks.items()]
    return f"""# Measurements, in their quick form

Written by `python benchmarks/tables.py` from one file, which `python benchmarks/run_all.py` writes: every
benchmark with fewer models, rounds and seeds, {minutes:,.0f} minutes for all of them on this machine. They show
that everything runs and of what size its figures are; what to cite stands in [the full
measurements](measurements.md) and on the page of [production deployment](deployment.md), under the same headings,
with what the columns mean and what to conclude.

{machine_line(results)}{other_work(results)}

{"".join(sections)}"""


def section(name: str, found: Results) -> str:
    """The tables of one benchmark."""
    heading, tables = TABLES[name]
    told = "\n\n".join(table(found["results"]) for table in tables)
    return f"## {heading}\n\n`python benchmarks/{name}.py --quick`, {found['seconds']:,.0f} s.\n\n{told}\n\n"
