"""What a search was asked for, checked before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

from lottery_tickets._arguments import check_count, check_seed
from lottery_tickets.detection import Criterion
from lottery_tickets.errors import SparsityError, StructureError, TrainingError
from lottery_tickets.masks import Kind, Patterns, lasting
from lottery_tickets.sparsity import check_sparsity


@dataclass(frozen=True)
class Settings:
    """When to look, at what, and what counts as settled.

    Attributes:
        sparsities: Fractions removed, all different.
        criterion: How distances or correlations are judged.
        threshold: Of the criterion; None for its source's.
        window: Likewise.
        max_epochs: Epochs to train at most.
        check_interval: Epochs between checks; of no account if there are steps.
        check_every_steps: Steps between checks, None for whole epochs.
        include: Widens what is prunable.
        exclude: Narrows it.
        seed: Of everything that is drawn.
        structure: Kind of the units that are watched; None for single weights.
    """

    sparsities: tuple[float, ...]
    criterion: Criterion
    threshold: float | None
    window: int | None
    max_epochs: int
    check_interval: int
    check_every_steps: int | None
    include: Patterns
    exclude: Patterns
    seed: int
    structure: Kind | None = None


def checked_settings(
    target_sparsity: float | Sequence[float],
    criterion: str,
    *,
    use_magnitude_ranking: bool,
    convergence_threshold: float | None,
    stability_window: int | None,
    max_epochs: int,
    check_interval: int,
    check_every_steps: int | None,
    include: Patterns,
    exclude: Patterns,
    seed: int,
    structure: str | None = None,
) -> Settings:
    """The settings, or an error that names the argument."""
    if use_magnitude_ranking and criterion == "queue":
        raise TrainingError(
            "use_magnitude_ranking=True asks for criterion='rank_correlation', and criterion says 'queue'. Leave "
            "one of them out."
        )
    check_count("max_epochs", max_epochs)
    check_count("check_interval", check_interval)
    check_count("check_every_steps", check_every_steps)
    if check_every_steps is not None and check_interval != 1:
        raise TrainingError(
            f"check_interval={check_interval} counts epochs and check_every_steps={check_every_steps} steps. "
            "Leave one of them out."
        )
    if check_every_steps is None and check_interval > max_epochs:
        raise TrainingError(
            f"check_interval={check_interval} is more than max_epochs={max_epochs}, so no check would follow "
            "training. Check more often or train longer."
        )
    check_seed(seed)
    return Settings(
        sparsities=_sparsities(target_sparsity),
        criterion="rank_correlation" if use_magnitude_ranking else criterion,  # type: ignore[arg-type]
        threshold=convergence_threshold,
        window=stability_window,
        max_epochs=max_epochs,
        check_interval=check_interval,
        check_every_steps=check_every_steps,
        include=lasting(include),
        exclude=lasting(exclude),
        seed=seed,
        structure=_structure(structure, include, exclude),
    )


def _structure(kind: str | None, include: Patterns, exclude: Patterns) -> Kind | None:
    if kind is None:
        return None
    if kind not in get_args(Kind):
        raise StructureError(f"structure is 'channel', 'head', 'neuron' or None for weights, got {kind!r}.")
    if include is not None or exclude is not None:
        raise TrainingError(
            f"structure={kind!r} watches all units of the kind, and include and exclude choose single parameters. "
            "Leave one or the other out."
        )
    return cast(Kind, kind)


def _sparsities(target: Any) -> tuple[float, ...]:
    given = list(target) if isinstance(target, Sequence) and not isinstance(target, str) else [target]
    sparsities = tuple(float(check_sparsity(one, "target_sparsity")) for one in given)
    if not sparsities or len(set(sparsities)) < len(sparsities):
        raise SparsityError(f"target_sparsity is a fraction or several different ones, got {target!r}.")
    if 0 in sparsities:
        raise SparsityError(
            "target_sparsity is 0, and a mask that keeps everything never changes; give a fraction."
        )
    return sparsities
