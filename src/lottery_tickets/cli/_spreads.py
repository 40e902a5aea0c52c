"""How a sparsity is spread over a model, as options say it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lottery_tickets.cli._criteria import Criterion
from lottery_tickets.errors import SparsityError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lottery_tickets.masks import Mask


class Scope(str, Enum):
    """What is compared: all weights, those of a tensor, those of an output row."""

    every = "global"
    layer = "layer"
    row = "row"


class Remainder(str, Enum):
    """What becomes of tensors that a pattern does not divide."""

    error = "error"
    dense = "dense"


ALLOCATIONS = ("global", "uniform", "erk", "lamp", "owl")

AllocationOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allocation",
        metavar="NAME | GLOB=SPARSITY",
        help="How many weights each tensor loses: global, uniform, erk, lamp or owl; or the sparsity of tensors "
        "by name, * matching any text, the others taking the rest. Repeatable.",
    ),
]
RemainderOption = Annotated[
    Remainder, typer.Option(help="Tensors whose inputs M does not divide: refuse them, or keep them whole.")
]


@dataclass(frozen=True)
class Spread:
    """Where the removed weights lie.

    Attributes:
        scope: "global", "layer", "row", or None for what the criterion calls for.
        allocation: A rule's name, or {glob: sparsity}, or None.
        pattern: "N:M", or None.
        pattern_remainder: What becomes of tensors that the pattern does not divide.
        min_density: Floor under the tensors of a threshold.
    """

    scope: str | None = None
    allocation: str | Mapping[str, float] | None = None
    pattern: str | None = None
    pattern_remainder: str = "error"
    min_density: float | None = None

    def scope_for(self, criterion: Criterion) -> str:
        """What is compared: as told, else what the criterion calls for where it means something."""
        if self.scope is not None:
            return self.scope
        thresholds = self.pattern is not None or self.allocation in ("global", "lamp")
        return "global" if thresholds or self.min_density is not None else criterion.scope

    def label(self, criterion: Criterion) -> str:
        """A short name for tables."""
        if self.pattern is not None:
            return self.pattern
        scope = self.scope_for(criterion)
        if self.allocation is None:
            return scope
        named = self.allocation if isinstance(self.allocation, str) else "by name"
        return f"{named}, {scope}" if scope != "global" else named

    def described(self, criterion: Criterion) -> dict[str, str]:
        """What a ticket says of it."""
        told: dict[str, str] = {"scope": self.scope_for(criterion)}
        if self.allocation is not None:
            named = isinstance(self.allocation, str)
            told["allocation"] = str(self.allocation) if named else json.dumps(self.allocation)
        if self.pattern is not None:
            told |= {"pattern": self.pattern, "pattern_remainder": self.pattern_remainder}
        if self.min_density is not None:
            told["min_density"] = json.dumps(self.min_density)
        return told

    def check(self, criterion: Criterion) -> None:
        """Refuse, before anything is computed, what means nothing for this criterion.

        Raises:
            SparsityError: A rule that weighs scores as sizes, and scores that are none.
        """
        if criterion.keep == "smallest" and self.allocation in ("lamp", "owl"):
            raise SparsityError(
                f"--allocation {self.allocation} weighs scores as sizes, and those of {criterion.name} may be "
                "negative. Choose another allocation or another criterion."
            )


def parsed_allocation(given: Sequence[str] | None) -> str | dict[str, float] | None:
    """A rule's name or sparsities by name, from what stands behind `--allocation`."""
    if not given:
        return None
    if len(given) == 1 and given[0] in ALLOCATIONS:
        return given[0]
    return dict(_glob_and_sparsity(text) for text in given)


def _glob_and_sparsity(text: str) -> tuple[str, float]:
    glob, sign, number = text.rpartition("=")
    try:
        if not sign or not glob:
            raise ValueError(text)
        return glob, float(number)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is none of {', '.join(ALLOCATIONS)}, alone, and not of the form GLOB=SPARSITY",
            param_hint="--allocation",
        ) from None


def draw(
    model: nn.Module | Path,
    scores: Mapping[str, torch.Tensor] | None,
    criterion: Criterion,
    sparsities: Sequence[float],
    spread: Spread,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: bool = False,
) -> list[Mask]:
    """Tickets from scores, or from the weights themselves where there are none.

    Args:
        model: What the tickets are for; by magnitude a checkpoint's folder will do.
        scores: Of the criterion; None ranks by magnitude.
        criterion: Says which end of the scores stays.
        sparsities: One ticket each; none for the one of a pattern.
        spread: Where the removed weights lie.
        include: See `prunable_parameters`.
        exclude: See `prunable_parameters`.
        progress: Show bars.
    """
    from lottery_tickets.importance_pruning import create_importance_mask
    from lottery_tickets.magnitude_pruning import create_magnitude_mask

    arguments: dict[str, Any] = {
        "scope": spread.scope_for(criterion),
        "allocation": spread.allocation,
        "pattern": spread.pattern,
        "pattern_remainder": spread.pattern_remainder,
        "min_density": spread.min_density,
        "include": include,
        "exclude": exclude,
        "progress": progress,
    }
    wanted = list(sparsities) if sparsities or spread.pattern is None else None
    if scores is None:
        drawn = create_magnitude_mask(model, wanted, **arguments)
    else:
        assert not isinstance(model, Path), "scores are matched with a model's parameters"
        drawn = create_importance_mask(scores, wanted, model=model, keep=criterion.keep, **arguments)
    return drawn if isinstance(drawn, list) else [drawn]


def rehearse(
    model: nn.Module,
    criterion: Criterion,
    sparsities: Sequence[float],
    spread: Spread,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
) -> None:
    """Draw the same tickets by magnitude: what cannot be met shows before scores are computed, not after.

    Raises:
        LotteryTicketError: Whatever `draw` would raise but for the scores.
    """
    spread.check(criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw(model, None, criterion, sparsities, spread, include=include, exclude=exclude)
