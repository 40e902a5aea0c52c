"""The papers, again: what `make reproduce` measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lottery_tickets.reports._content import Axis, Curves, Fact, Figure, Level, Line, Section
from lottery_tickets.reports._numbers import plain, precise_percent
from lottery_tickets.reports._rounds import density_axis, mean_points

Results = Mapping[str, Any]

_ACCURACY = Axis("test accuracy", spelling=precise_percent, percent=True)
_OVER_SEEDS = "Means over seeds; bands reach from the least to the greatest."


def sections_of_reproduction(results: Results, source: str) -> list[Section]:
    """One for each experiment that there are results of."""
    told = {"lenet": ("Winning tickets", _lenet), "cnn": ("Where to rewind to", _cnn)}
    return [
        Section(
            title=f"{title}, {results['data']}",
            kind="the papers, again",
            source=source,
            facts=[
                Fact("seeds", plain(len(results[name]["seeds"]))),
                Fact("rounds", plain(results[name]["settings"]["rounds"])),
            ],
            figures=figures(results[name]),
            configuration={**results[name]["settings"], "command": results["command"]},
            versions={
                package: number for package, number in results["machine"]["versions"].items() if number is not None
            },
        )
        for name, (title, figures) in told.items()
        if name in results
    ]


def _lenet(results: Results) -> list[Figure]:
    networks = [one for unit in results["seeds"] for one in unit["networks"]]
    kinds = list(dict.fromkeys(one["kind"] for one in networks))
    axis = density_axis([one["density"] for one in networks])

    def lines(key: str) -> list[Line]:
        return [
            Line(
                kind,
                mean_points(
                    _by("density", key, [one for one in networks if one["kind"] == kind or not one["round"]])
                ),
            )
            for kind in kinds
        ]

    return [
        Curves(
            "accuracy",
            "Test accuracy at early stopping",
            _OVER_SEEDS,
            axis,
            _ACCURACY,
            lines("early_stopping_test_accuracy"),
        ),
        Curves(
            "early-stopping",
            "When training could have stopped",
            f"The step of the least validation loss. {_OVER_SEEDS}",
            axis,
            Axis("early-stopping step"),
            lines("early_stopping_step"),
        ),
    ]


def _cnn(results: Results) -> list[Figure]:
    subjects = {"dense": "dense network", "ticket": "sparsest ticket"}
    barriers = [
        Line(
            label,
            mean_points(
                _by(
                    "rewind_step",
                    "error_barrier",
                    [p for unit in results["seeds"] for p in unit["instability"][kind]],
                )
            ),
        )
        for kind, label in subjects.items()
    ]
    networks = [one for unit in results["seeds"] for one in unit["networks"]]
    steps = list(dict.fromkeys(one["rewind_step"] for one in networks))
    return [
        Curves(
            "barriers",
            "Error barrier over the rewinding step",
            f"How far the error rises on the line between two copies. {_OVER_SEEDS}",
            Axis("rewinding step", scale="symlog"),
            Axis("error barrier", spelling=precise_percent, percent=True),
            barriers,
            [Level(0.02, "stable below")],
        ),
        Curves(
            "accuracy",
            "Test accuracy at the end",
            f"Rewound to {' and to '.join(f'step {plain(step)}' for step in steps)}. {_OVER_SEEDS}",
            density_axis([one["density"] for one in networks]),
            _ACCURACY,
            [
                Line(
                    f"rewound to step {plain(step)}",
                    mean_points(
                        _by("density", "test_accuracy", [one for one in networks if one["rewind_step"] == step])
                    ),
                )
                for step in steps
            ],
        ),
    ]


def _by(place: str, key: str, ones: Iterable[Mapping[str, Any]]) -> dict[float, list[float]]:
    found: dict[float, list[float]] = {}
    for one in ones:
        found.setdefault(one[place], []).append(one[key])
    return found
