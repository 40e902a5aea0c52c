"""The criteria that commands know, in one table."""

from __future__ import annotations

import re
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
        factors: Of a hybrid, its criteria and what their ranks are multiplied by.
    """

    name: str
    about: str
    scorer: str | None = None
    needs_text: bool = True
    scope: str = "global"
    keep: Literal["largest", "smallest"] = "largest"
    factors: tuple[tuple[str, float], ...] = ()


_ALL = (
    Criterion("magnitude", "|w|", needs_text=False),
    Criterion("wanda", "|w| times the norm of its input", "compute_wanda_importance", scope="row"),
    Criterion("grad_norm", "mean |dL/dw|", "compute_gradient_norm_importance"),
    Criterion("taylor", "mean |w dL/dw|", "compute_taylor_importance"),
    Criterion("fisher", "mean (dL/dw)^2", "compute_fisher_importance"),
    Criterion("obd", "w^2 mean (dL/dw)^2 / 2", "compute_obd_importance"),
    Criterion("snip", "|w dL/dw| of one batch", "compute_snip_importance"),
    Criterion("grasp", "-w (Hg), the largest going first", "compute_grasp_importance", keep="smallest"),
    Criterion("synflow", "synaptic flow, by order of removal", "compute_synflow_importance", needs_text=False),
)
HYBRIDS = "Sums of ranks are written magnitude+0.5fisher."
_MEMBER = re.compile(r"(\d+(?:\.\d+)?)?([a-z_]+)")
CRITERIA: Mapping[str, Criterion] = {criterion.name: criterion for criterion in _ALL}
# SynFlow's scores are places in an order already, and GraSP's rank downwards: a hybrid takes neither.
_SUMMABLE = [one.name for one in _ALL if one.name not in ("grasp", "synflow")]


def criterion_of(name: str) -> Criterion:
    """The criterion of this name, for options; names joined by plus signs are a hybrid.

    Raises:
        BadParameter: No such criterion.

    Example:
        >>> from lottery_tickets.cli._criteria import criterion_of
        >>> criterion_of("0.5magnitude+fisher").factors
        (('magnitude', 0.5), ('fisher', 1.0))
    """
    if name in CRITERIA:
        return CRITERIA[name]
    found = [_MEMBER.fullmatch(part) for part in name.split("+")]
    factors = tuple((part[2], float(part[1] or 1)) for part in found if part and part[2] in _SUMMABLE)
    if len(dict(factors)) < max(2, len(found)):  # several, all known, none twice
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(CRITERIA)}, nor several of {', '.join(_SUMMABLE)} "
            "joined by plus signs, each with its factor before it if that is not 1."
        )
    return Criterion(name, "sum of ranks", "compute_hybrid_importance", factors=factors)


def criterion_option(description: str) -> Any:
    """`--criterion`, with the names that it takes."""
    return typer.Option(
        "--criterion", parser=criterion_of, metavar=f"[{'|'.join(CRITERIA)}]", help=f"{description} {HYBRIDS}"
    )


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
    data: tuple[Any, ...] = (batches, dict(criterion.factors)) if criterion.factors else (batches,)
    return scorer(model, *data, num_samples=None, seed=seed, **options)
