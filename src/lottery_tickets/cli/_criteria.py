"""The criteria that commands know, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    import torch
    from torch import nn

Scorer = Callable[..., "dict[str, torch.Tensor]"]


@dataclass(frozen=True)
class Criterion:
    """A way to rank weights.

    Attributes:
        name: What the command line calls it.
        about: What it ranks by, for tables.
        scorer: Name of the function in `importance_scoring`; None where weights rank by themselves.
        needs_text: Whether scores come from data.
        scope: What is compared unless the user says: all weights, or those of an output row.
        keep: Which end of the scores stays.
    """

    name: str
    about: str
    scorer: str | None = None
    needs_text: bool = True
    scope: str = "global"
    keep: Literal["largest", "smallest"] = "largest"


_ALL = (
    Criterion("magnitude", "|w|", needs_text=False),
    Criterion("grad_norm", "mean |dL/dw|", "compute_gradient_norm_importance"),
    Criterion("taylor", "mean |w dL/dw|", "compute_taylor_importance"),
    Criterion("fisher", "mean (dL/dw)^2", "compute_fisher_importance"),
    Criterion("obd", "w^2 mean (dL/dw)^2 / 2", "compute_obd_importance"),
    Criterion("snip", "|w dL/dw| of one batch", "compute_snip_importance"),
)
CRITERIA: Mapping[str, Criterion] = {criterion.name: criterion for criterion in _ALL}


def criterion_of(name: str) -> Criterion:
    """The criterion of this name, for options.

    Raises:
        BadParameter: No such criterion.
    """
    if name not in CRITERIA:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(CRITERIA)}.")
    return CRITERIA[name]


def criterion_option(description: str) -> Any:
    """`--criterion`, with the names that it takes."""
    return typer.Option("--criterion", parser=criterion_of, metavar=f"[{'|'.join(CRITERIA)}]", help=description)


def compute_scores(
    criterion: Criterion,
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Scores of a criterion that has a scorer, from all the samples of the batches."""
    assert criterion.scorer is not None, criterion
    scorer: Scorer = getattr(import_module("lottery_tickets.importance_scoring"), criterion.scorer)
    options: dict[str, Any] = {"include": include, "exclude": exclude, "progress": progress}
    if not criterion.needs_text:
        return scorer(model, **options)
    return scorer(model, batches, num_samples=None, seed=seed, **options)
