"""Tickets themselves: what each tensor loses, how far masks lie apart, how far tickets agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from lottery_tickets._score_files import read_scores
from lottery_tickets.detection import differing_bits
from lottery_tickets.masks import Mask, readable_metadata
from lottery_tickets.overlap import compute_ticket_overlap
from lottery_tickets.reports._content import Axis, Bars, Cell, Fact, Level, Matrix, Section, Table
from lottery_tickets.reports._numbers import memory, percent, plain

MOST_TICKETS = 24  # in one matrix

_SHADES = "The stronger the colour, the more they agree; 1 is the same ticket."
_METHODS = {
    "jaccard": "Jaccard index: weights that both keep, of those that either keeps.",
    "dice": "Dice index: twice the weights that both keep, of those of the one and of the other.",
    "overlap": "Overlap coefficient: weights that both keep, of those of the sparser one.",
}


def load_tickets(paths: Mapping[str, Path]) -> dict[str, Mask]:
    """Those that are there, by what to call them; the middle ones are left out where they are many."""
    there = [(name, path) for name, path in paths.items() if path.exists()]
    step = -(-len(there) // MOST_TICKETS)
    shown = there[::-1][::step][::-1] if there else []
    return {name: Mask.load(path) for name, path in shown}


def layer_bars(sparsities: Mapping[str, float], whose: str) -> Bars:
    """What each tensor loses."""
    return Bars(
        "layers",
        "Sparsity of each tensor",
        f"Share of its weights that each tensor loses in {whose}.",
        Axis("sparsity", spelling=percent, percent=True, from_zero=True),
        "tensor",
        list(sparsities),
        list(sparsities.values()),
    )


def layer_table(mask: Mask, whose: str) -> Table:
    """The same to look up, with sizes."""
    kept, sparsity = mask.layer_kept(), mask.layer_sparsity()
    rows = [
        [
            Cell(name),
            Cell(" x ".join(map(str, shape)), float(shape.numel())),
            Cell(plain(shape.numel()), float(shape.numel())),
            Cell(plain(kept[name]), float(kept[name])),
            Cell(percent(sparsity[name]), sparsity[name], sparsity[name]),
        ]
        for name, shape in mask.shapes.items()
    ]
    return Table(f"Tensors of {whose}", ["tensor", "shape", "weights", "kept", "sparsity"], rows)


def distance_matrix(masks: Mapping[str, Mask], what: str, summary: str) -> Matrix:
    """Share of the mask's bits in which each pair differs.

    References:
        You et al., "Drawing Early-Bird Tickets", ICLR 2020, figure 3: the same matrix, there for channel masks.
    """
    names, found = list(masks), list(masks.values())
    values: list[list[float | None]] = [[0.0] * len(found) for _ in found]
    for row, column in combinations(range(len(found)), 2):
        differing = sum(differing_bits(found[row], found[column]).values())
        values[row][column] = values[column][row] = differing / max(1, found[row].numel)
    return Matrix(
        "distances",
        "Distances between masks",
        f"Share of the masks' bits that differ: the stronger the colour, the farther apart. {summary}",
        Axis("mask distance", spelling=percent, percent=True),
        what,
        names,
        values,
    )


def section_of_overlaps(tickets: Mapping[str, Mask]) -> Section | None:
    """Every ticket beside every other, where any two speak of the same tensors."""
    names, masks = list(tickets)[:MOST_TICKETS], list(tickets.values())[:MOST_TICKETS]
    values: list[list[float | None]] = [[1.0 if row == column else None for column in names] for row in names]
    chances, skipped = [], False
    for row, column in combinations(range(len(masks)), 2):
        if not _comparable(masks[row], masks[column]):
            continue
        found = compute_ticket_overlap(masks[row], masks[column])
        values[row][column] = values[column][row] = found["overall_overlap"]
        chances.append(found["expected_by_chance"])
        skipped = skipped or bool(found["skipped_layers"])
    if not chances:
        return None
    chance = (
        f"{min(chances):.3f}"
        if max(chances) - min(chances) < 5e-4
        else f"{min(chances):.3f} to {max(chances):.3f}"
    )
    notes = []
    if len(tickets) > MOST_TICKETS:
        notes.append(f"The first {MOST_TICKETS} of {len(tickets)} tickets.")
    if skipped:
        notes.append(
            "Tensors that only one of two tickets has, or that differ in shape, are left out of the pair."
        )
    matrix = Matrix(
        "overlap",
        "Overlap of tickets",
        f"{_METHODS['jaccard']} {_SHADES} By chance it would be {chance}.",
        Axis("overlap", spelling=_two_digits),
        "ticket",
        names,
        values,
    )
    return Section("Tickets beside each other", "overlap", figures=[matrix], notes=notes)


def section_of_overlap(results: Mapping[str, Any], source: str) -> Section:
    """Two tickets beside each other, as `overlap` has compared them."""
    method, whole, chance = results["method"], results["overall_overlap"], results["expected_by_chance"]
    names = names_apart([ticket_name(results[one]) for one in ("first", "second")])
    layers, counts = results["layer_overlaps"], results["summary"]
    return Section(
        title=f"Overlap of {' and '.join(names)}",
        kind="overlap",
        source=source,
        conclusion=f"Both keep {plain(counts['total_intersection'])} weights, of "
        f"{plain(counts['total_union'])} that either keeps.",
        reason=f"{method.capitalize()} index {whole:.3f}; by chance it would be {chance:.3f}.",
        facts=[
            Fact(method, f"{whole:.4f}"),
            Fact("by chance", f"{chance:.4f}"),
            *([] if results["z_score"] is None else [Fact("z-score", plain(results["z_score"]))]),
            Fact("sparsities", f"{percent(counts['sparsity_mask1'])}, {percent(counts['sparsity_mask2'])}"),
        ],
        figures=[
            Matrix(
                "overlap",
                "Overlap of two tickets",
                f"{_METHODS[method]} {_SHADES} By chance it would be {chance:.3f}.",
                Axis("overlap", spelling=_two_digits),
                "ticket",
                names,
                [[1.0, whole], [whole, 1.0]],
            ),
            Bars(
                "layers",
                "Overlap in each tensor",
                f"The same within each tensor. Dashed: over all of them, {whole:.3f}.",
                Axis("overlap", spelling=_two_digits, from_zero=True),
                "tensor",
                list(layers),
                list(layers.values()),
                Level(whole, f"over all: {whole:.3f}"),
            ),
        ],
        tables=[
            Table(
                "Overlap in each tensor",
                ["tensor", method],
                [[Cell(name), Cell(f"{one:.4f}", one, one)] for name, one in layers.items()],
            )
        ],
        notes=results["warnings"],
        configuration={name: results[name] for name in ("first", "second", "method")},
        versions=results.get("made_with", {}),
    )


def section_of_ticket(path: Path) -> tuple[Section, Mask]:
    """A ticket file, with what it says of itself."""
    mask = Mask.load(path)
    section = Section(
        title=path.name,
        kind="ticket",
        source=str(path),
        conclusion=f"Keeps {plain(mask.kept)} of {plain(mask.numel)} weights.",
        facts=[
            Fact("sparsity", percent(mask.sparsity)),
            Fact("tensors", plain(len(mask.names))),
            Fact("size", memory(path.stat().st_size)),
            Fact("digest", mask.digest()[:12]),
        ],
        figures=[layer_bars(mask.layer_sparsity(), "this ticket")],
        tables=[layer_table(mask, "this ticket")],
        configuration={"digest": mask.digest(), **readable_metadata(mask.metadata)},
    )
    return section, mask


def section_of_scores(path: Path) -> Section:
    """A file of scores: how large they are, tensor by tensor."""
    scores, metadata = read_scores(path)
    numbers = {name: _summary(tensor) for name, tensor in scores.items()}
    means = {name: one[1] for name, one in numbers.items()}
    rows = [
        [Cell(name), Cell(plain(count), float(count)), *(Cell(plain(one), one) for one in rest)]
        for name, (count, *rest) in numbers.items()
    ]
    return Section(
        title=path.name,
        kind="importance scores",
        source=str(path),
        conclusion=f"Scores of {plain(sum(one[0] for one in numbers.values()))} weights by "
        f"{metadata.get('criterion', 'a criterion that is not told')}.",
        facts=[Fact("tensors", plain(len(scores))), Fact("size", memory(path.stat().st_size))],
        figures=[
            Bars(
                "scores",
                "Mean score of each tensor",
                "Tensors with larger scores lose fewer weights where all are ranked together.",
                Axis("mean score", from_zero=True),
                "tensor",
                list(means),
                list(means.values()),
            )
        ],
        tables=[Table("Scores of each tensor", ["tensor", "weights", "mean", "least", "greatest"], rows)],
        configuration=dict(sorted(metadata.items())),
    )


def _comparable(one: Mask, other: Mask) -> bool:
    return any(other.shapes.get(name) == shape for name, shape in one.shapes.items())


def _two_digits(value: float) -> str:
    return f"{value:.2f}"


def _summary(tensor: torch.Tensor) -> tuple[int, float, float, float]:
    """Weights, and the mean, least and greatest of their scores."""
    if not tensor.numel():
        return 0, 0.0, 0.0, 0.0
    return tensor.numel(), float(tensor.double().mean()), float(tensor.min()), float(tensor.max())


def ticket_name(path: str) -> str:
    """What to call the ticket of a file."""
    return Path(path).name.removesuffix(".safetensors")


def names_apart(names: Sequence[str]) -> list[str]:
    """The same, those that occur twice with a number behind."""
    seen: dict[str, int] = {}
    apart = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        apart.append(name if names.count(name) == 1 else f"{name} ({seen[name]})")
    return apart
