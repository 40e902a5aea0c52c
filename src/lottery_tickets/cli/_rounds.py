"""The rounds of a run, over its seeds: means, intervals and the table of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lottery_tickets.cli._plan import Plan
from lottery_tickets.cli._shell import new_table, with_interval
from lottery_tickets.errors import RunFolderError

RunArgument = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder that imp was told by -o.", show_default=False)
]

CONFIDENCE = 0.95

# Of a round, what is told over seeds.
_NUMBERS = (
    *("accuracy", "eval_loss", "test_accuracy", "test_loss", "train_loss"),
    *("early_stopping_step", "early_stopping_accuracy", "early_stopping_loss"),
    *("early_stopping_test_accuracy", "early_stopping_test_loss"),
)


def report_of(plan: Plan, folder: Path, seeds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """What `imp` tells.

    Args:
        plan: What was asked for.
        folder: Of the run.
        seeds: Seed to its target's sparsity, rewinding point, digest and rounds.
    """
    by_round = zip(*(one["rounds"] for one in seeds.values()), strict=True)
    rounds = [_over_seeds(records) for records in by_round]
    tested = "test_loss" in rounds[0]["numbers"]
    return {
        "network": plan.network_name,
        "data": plan.data_name,
        "run": str(folder),
        "seeds": list(seeds),
        "confidence": CONFIDENCE,
        "measured_on": "test" if tested else "validation",
        "rewind": plan.rewind,
        "rewind_step": next(iter(seeds.values()))["rewind_step"],
        "rounds": rounds,
        "runs": {str(seed): one for seed, one in seeds.items()},
        "picture": None,
    }


def finished(folder: Path) -> dict[str, Any]:
    """What `imp` told of a run.

    Raises:
        RunFolderError: The run has not ended, or its results cannot be read.
    """
    path = folder / "results.json"
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunFolderError(
            f"{path} is not there: the run has not ended. Give the command that began it again, and it goes on."
        ) from None
    except (OSError, ValueError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}). Give the command that made it again; nothing is trained anew."
        ) from error
    return report


def checked_round(report: Mapping[str, Any], wanted: int | None) -> int:
    """The number of a round that the run has; its last unless told."""
    last: int = report["rounds"][-1]["round"]
    if wanted is not None and wanted > last:
        raise typer.BadParameter(f"{report['run']} has {last} rounds", param_hint="--round")
    return wanted or last


def seeds_in_words(seeds: Sequence[int]) -> str:
    """How many, or which one."""
    return f"{len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"


def mask_path(folder: Path, seed: int, number: int) -> Path:
    """The ticket of a seed and a round."""
    return folder / f"seed-{seed}" / "masks" / f"round-{number:02d}.safetensors"


def rewind_path(folder: Path, seed: int) -> Path:
    """The weights that the tickets of a seed are meant for."""
    return folder / f"seed-{seed}" / "rewind" / "model.safetensors"


def show_rounds(console: Console, report: Mapping[str, Any]) -> None:
    """The table of all densities."""
    from lottery_tickets.reports import scores_of

    early, end, name = scores_of(report)
    seeds = report["seeds"]
    subject = f"{report['network']} on {report['data']}, {seeds_in_words(seeds)}"
    table = new_table(title=f"Iterative magnitude pruning of {subject}")
    headings = ("round", "density", "sparsity", f"{name}\nstopped early", "at the end", "stopped at step")
    for heading in headings:
        table.add_column(heading, justify="right")
    for one in report["rounds"]:
        table.add_row(
            str(one["round"] or "dense"),
            f"{one['density']:.2%}",
            f"{one['sparsity']:.4f}",
            _told(one, early, 4),
            _told(one, end, 4),
            _told(one, "early_stopping_step", 0),
        )
    console.print(table)
    stopping = "Stopped early: at the step of the least validation loss."
    if len(seeds) > 1:
        stopping = f"In brackets: {report['confidence']:.0%} intervals over seeds (Student). {stopping}"
    console.print(stopping)
    console.print(f"tickets: {report['run']}/seed-*/masks/round-*.safetensors", soft_wrap=True)
    if report["picture"]:
        console.print(f"curves: {report['picture']}", soft_wrap=True)


def _told(one: Mapping[str, Any], name: str, digits: int) -> str:
    found = one["numbers"].get(name)
    return "-" if found is None else with_interval(found["mean"], found["interval"], digits)


def _over_seeds(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A round; numbers that some seed lacks, an accuracy where there are no classes say, are left out."""
    first = records[0]
    values = {name: [one[name] for one in records] for name in _NUMBERS}
    return {
        "round": first["round"],
        "sparsity": first["sparsity"],
        "density": 1 - first["sparsity"],
        "numbers": {name: _summary(every) for name, every in values.items() if None not in every},
    }


def _summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean and Student's interval of it; None for a single value."""
    from lottery_tickets._statistics import ratio_interval

    return {
        "mean": sum(values) / len(values),
        "interval": ratio_interval(values, [1.0] * len(values), CONFIDENCE),
        "values": list(values),
    }
