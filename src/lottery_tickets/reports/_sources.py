"""From a path to what there is to say about it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from lottery_tickets._score_files import FORMAT as SCORES
from lottery_tickets.errors import LotteryTicketError, ReportError
from lottery_tickets.masks import Mask
from lottery_tickets.reports._comparisons import (
    section_of_comparison,
    section_of_demo,
    section_of_evaluation,
)
from lottery_tickets.reports._content import Document, Section
from lottery_tickets.reports._judgements import section_of_stability, section_of_verdict
from lottery_tickets.reports._memory import section_of_plan
from lottery_tickets.reports._numbers import percent
from lottery_tickets.reports._reproduced import sections_of_reproduction
from lottery_tickets.reports._rounds import section_of_rounds
from lottery_tickets.reports._searches import sections_of_search
from lottery_tickets.reports._tickets import (
    load_tickets,
    names_apart,
    section_of_overlap,
    section_of_overlaps,
    section_of_scores,
    section_of_ticket,
)

_RESULTS, _CONFIG, _OPTIONS = "results.json", "config.json", "run.yaml"
_KNOWN = (
    "the folder of a run of early-bird, imp, verdict or stability, what evaluate, overlap, compare, plan or demo "
    "wrote as JSON, a ticket or a file of scores"
)

Found = tuple[list[Section], list[tuple[str, Mask]]]  # what to say, and the tickets to lay beside each other


def document_of(paths: Sequence[Path], title: str | None = None) -> Document:
    """What there is to say about all of them.

    Raises:
        ReportError: A path at which there is nothing to report, or that is damaged.
    """
    sections: list[Section] = []
    tickets: list[tuple[str, Mask]] = []
    for path in paths:
        found, own = _found(path)
        sections += found
        tickets += own
    named = dict(zip(names_apart([name for name, _ in tickets]), [mask for _, mask in tickets], strict=True))
    beside = section_of_overlaps(named) if len(named) > 1 else None
    if beside is not None:
        sections.append(beside)
    return Document(title or sections[0].title + (", and more" if len(paths) > 1 else ""), sections)


def _found(path: Path) -> Found:
    try:
        if path.is_dir():
            return _in_folder(path)
        if path.suffix == ".safetensors":
            return _in_safetensors(path)
        return _in_json(path)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, LotteryTicketError):
            raise
        raise ReportError(
            f"{path}: not whole, or not as this version writes it ({type(error).__name__}: {error}). Make it "
            "again."
        ) from error


def _in_folder(folder: Path) -> Found:
    if not (folder / _RESULTS).exists():
        if (folder / _CONFIG).exists() or (folder / "state" / _CONFIG).exists():
            raise ReportError(
                f"{folder}: the run has not ended, for {_RESULTS} is not there. Give the command that began it "
                "again, and it goes on."
            )
        raise ReportError(f"{folder}: no run; a report is made of {_KNOWN}.")
    sections, tickets = _in_json(folder / _RESULTS)
    # What was made of the run afterwards lies within it.
    verdicts = [_in_json(path)[0][0] for path in sorted(folder.glob(f"verdict/*/{_RESULTS}"))]
    if verdicts:
        told = " ".join(f"{one.title.partition(' of ')[0]}: {one.conclusion}" for one in verdicts)
        sections[0] = replace(sections[0], reason=told)
    sections += verdicts
    for path in sorted(folder.glob(f"stability/*/{_RESULTS}")):
        sections += _in_json(path)[0]
    return sections, tickets


def _in_json(path: Path) -> Found:
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise ReportError(f"{path}: no JSON ({error}); a report is made of {_KNOWN}.") from error
    if not isinstance(results, dict):
        raise ReportError(f"{path}: JSON, but nothing that a command wrote; a report is made of {_KNOWN}.")
    command = str(results.get("schema", "")).removeprefix("lottery-tickets.").partition("/")[0]
    if command in _READERS:
        return _READERS[command](results, path)
    if results.keys() & {"lenet", "cnn"} and "machine" in results:
        return sections_of_reproduction(results, str(path)), []
    told = f"what {command} writes" if command else "without the schema of a command"
    raise ReportError(f"{path}: {told}, of which there is no report; give {_KNOWN}.")


def _in_safetensors(path: Path) -> Found:
    try:
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {}).get("format")
    except SafetensorError:
        kind = None  # the ticket's own reader says what is wrong
    if kind == SCORES:
        return [section_of_scores(path)], []
    section, mask = section_of_ticket(path)
    return [section], [(path.stem, mask)]


def _of_imp(results: Mapping[str, Any], path: Path) -> Found:
    folder = path.parent
    last = results["rounds"][-1]
    tickets = load_tickets(
        {
            f"{folder.resolve().name} {percent(last['density'])} seed {seed}": folder
            / f"seed-{seed}"
            / "masks"
            / f"round-{last['round']:02d}.safetensors"
            for seed in results["seeds"]
        }
    )
    return [section_of_rounds(results, folder, _configuration(folder))], list(tickets.items())


def _of_search(results: Mapping[str, Any], path: Path) -> Found:
    folder = path.parent
    found = sections_of_search(results, folder, _configuration(folder / "state"))
    return [section for section, _ in found], [pair for _, tickets in found for pair in tickets.items()]


def _of_plans(results: Mapping[str, Any], path: Path) -> Found:
    return [section_of_plan(plan, str(path)) for plan in results["plans"]], []


def _with_settings(
    section: Callable[[Mapping[str, Any], str], Section],
) -> Callable[[Mapping[str, Any], Path], Found]:
    """Of a run that lies in its folder beside the options that it was started with."""

    def read(results: Mapping[str, Any], path: Path) -> Found:
        found = section(results, str(path))
        return [replace(found, configuration={**found.configuration, **_settings(path.parent)})], []

    return read


def _alone(section: Callable[[Mapping[str, Any], str], Section]) -> Callable[[Mapping[str, Any], Path], Found]:
    return lambda results, path: ([section(results, str(path))], [])


_READERS: dict[str, Callable[[Mapping[str, Any], Path], Found]] = {
    "imp": _of_imp,
    "early-bird": _of_search,
    "verdict": _with_settings(section_of_verdict),
    "stability": _with_settings(section_of_stability),
    "evaluate": _alone(section_of_evaluation),
    "overlap": _alone(section_of_overlap),
    "compare": _alone(section_of_comparison),
    "demo": _alone(section_of_demo),
    "plan": _of_plans,
}


def _settings(folder: Path) -> dict[str, Any]:
    """Every option as the command has written it down; empty where that is gone."""
    import yaml

    path = folder / _OPTIONS
    try:
        return {str(name): value for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        return {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _configuration(folder: Path) -> dict[str, Any]:
    """What the run was started with; empty where its own state was deleted."""
    path = folder / _CONFIG
    if not path.exists():
        return {}
    return dict(json.loads(path.read_text(encoding="utf-8"))["configuration"])
