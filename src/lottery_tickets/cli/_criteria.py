"""The criteria that commands know, in one table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import typer

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn

    from lottery_tickets.cli._computing import Computing

Scorer = Callable[..., "dict[str, torch.Tensor]"]


@dataclass(frozen=True)
class Criterion:
    """A way to rank weights.

    Attributes:
        name: What the command line calls it.
        about: What it ranks by, for tables.
        scorer: Name of the function in `importance_scoring`; None where weights rank by themselves.
        options: What the function is told to make this criterion of its family.
        family: What hybrids know the criterion by; None where they take it for no member.
        by_gradients: It sums over gradients, and takes what bounds the sums.
        in_rounds: It goes in rounds.
        needs_text: Whether scores come from data.
        scope: What is compared unless the user says: all weights, or those of an output row.
        keep: Which end of the scores stays.
        members: Of a hybrid, its criteria and what their ranks are multiplied by.
    """

    name: str
    about: str
    scorer: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    family: str | None = None
    by_gradients: bool = False
    in_rounds: bool = False
    needs_text: bool = True
    scope: str = "global"
    keep: Literal["largest", "smallest"] = "largest"
    members: tuple[tuple[Criterion, float], ...] = ()

    @property
    def looks_at_batches(self) -> bool:
        """Whether its gradients are those of batches, so that no sample's can be clipped."""
        return ("kind", "batch") in self.options or any(one.looks_at_batches for one, _ in self.members)


def _by_gradients(name: str, about: str, family: str, scorer: str, **options: str) -> Criterion:
    return Criterion(name, about, scorer, tuple(options.items()), family, by_gradients=True)


_ALL = (
    Criterion("magnitude", "|w|", family="magnitude", needs_text=False),
    Criterion("wanda", "|w| times the norm of its input", "compute_wanda_importance", family="wanda", scope="row"),
    _by_gradients("grad_norm", "mean |dL/dw|", "grad_norm", "compute_gradient_norm_importance"),
    _by_gradients("taylor", "mean |w dL/dw|", "taylor", "compute_taylor_importance"),
    _by_gradients("taylor-squared", "mean (w dL/dw)^2", "taylor", "compute_taylor_importance", order="squared"),
    _by_gradients("fisher", "mean (dL/dw)^2", "fisher", "compute_fisher_importance"),
    _by_gradients(
        "fisher-true", "the same, labels drawn from the model", "fisher", "compute_fisher_importance", kind="true"
    ),
    _by_gradients(
        "fisher-batch", "(dL/dw)^2 of whole batches", "fisher", "compute_fisher_importance", kind="batch"
    ),
    _by_gradients("obd", "w^2 mean (dL/dw)^2 / 2", "obd", "compute_obd_importance"),
    _by_gradients("snip", "|w dL/dw| of one batch", "snip", "compute_snip_importance"),
    Criterion("grasp", "-w (Hg), the largest going first", "compute_grasp_importance", keep="smallest"),
    Criterion(
        "synflow",
        "synaptic flow, by order of removal",
        "compute_synflow_importance",
        in_rounds=True,
        needs_text=False,
    ),
)
HYBRIDS = "Sums of ranks are written magnitude+0.5fisher."
_MEMBER = re.compile(r"(\d+(?:\.\d+)?)?([a-z_-]+)")
CRITERIA: Mapping[str, Criterion] = {criterion.name: criterion for criterion in _ALL}
# SynFlow's scores are places in an order already, and GraSP's rank downwards: a hybrid takes neither.
_SUMMABLE = [one.name for one in _ALL if one.family is not None]


def criterion_of(name: str) -> Criterion:
    """The criterion of this name, for options; names joined by plus signs are a hybrid.

    Raises:
        BadParameter: No such criterion.

    Example:
        >>> from lottery_tickets.cli._criteria import criterion_of
        >>> [(member.name, factor) for member, factor in criterion_of("0.5magnitude+fisher-true").members]
        [('magnitude', 0.5), ('fisher-true', 1.0)]
    """
    if name in CRITERIA:
        return CRITERIA[name]
    found = [_MEMBER.fullmatch(part) for part in name.split("+")]
    members = tuple((CRITERIA[part[2]], float(part[1] or 1)) for part in found if part and part[2] in _SUMMABLE)
    if len({one.family for one, _ in members}) < max(2, len(found)):  # several, all known, no family twice
        raise typer.BadParameter(
            f"{name!r} is not one of {', '.join(CRITERIA)}, nor several of {', '.join(_SUMMABLE)} "
            "joined by plus signs, no two of one kind, each with its factor before it if that is not 1."
        )
    return Criterion(
        name,
        "sum of ranks",
        "compute_hybrid_importance",
        by_gradients=any(one.by_gradients for one, _ in members),
        members=members,
    )


def criterion_option(description: str) -> Any:
    """`--criterion`, with the names that it takes."""
    return typer.Option(
        "--criterion", parser=criterion_of, metavar=f"[{'|'.join(CRITERIA)}]", help=f"{description} {HYBRIDS}"
    )


def compute_scores(
    criterion: Criterion,
    model: nn.Module | Path,
    batches: Sequence[Mapping[str, torch.Tensor]],
    how: Computing,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    progress: bool = False,
) -> dict[str, torch.Tensor]:
    """Scores of a criterion that has a scorer, from all the samples of the batches."""
    assert criterion.scorer is not None, criterion
    scorer: Scorer = getattr(import_module("lottery_tickets.importance_scoring"), criterion.scorer)
    options: dict[str, Any] = {"include": include, "exclude": exclude, "progress": progress}
    if criterion.in_rounds:
        options |= how.for_rounds()
    if not criterion.needs_text:
        return scorer(model, **options)
    options |= {"num_samples": None, "seed": how.seed}
    if not criterion.members:
        return scorer(model, batches, **options, **_own(criterion, how))
    families = {str(one.family): factor for one, factor in criterion.members}
    told = {str(one.family): _own(one, how) for one, _ in criterion.members}
    return scorer(model, batches, families, options=told, **options)


def _own(criterion: Criterion, how: Computing) -> dict[str, Any]:
    """What no other family takes."""
    return dict(criterion.options) | (how.for_gradients() if criterion.by_gradients else how.for_blocks())
