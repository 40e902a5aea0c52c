"""Detection over the masks of somebody's own training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypedDict

import torch

from lottery_tickets.detection._detector import Criterion, EarlyBirdDetector
from lottery_tickets.errors import DetectionError
from lottery_tickets.masks import Mask, as_mask

_ENDED = object()


class EarlyBirdDetection(TypedDict):
    """What `detect_early_bird_convergence` returns.

    Attributes:
        converged: Whether the ticket settled.
        convergence_check: Index of the check at which it had, from 0; None if it did not.
        distances: For each check looked at, the fraction of mask bits that differ from each kept mask, the oldest
            first.
        final_mask: The mask of the check of convergence, or of the last check.
        reason: Why, in words and figures.
    """

    converged: bool
    convergence_check: int | None
    distances: list[tuple[float, ...]]
    final_mask: Mask
    reason: str


def detect_early_bird_convergence(
    masks: Iterable[Mapping[str, torch.Tensor]],
    *,
    criterion: Criterion = "window",
    threshold: float | None = None,
    window: int | None = None,
    correlations: Iterable[float | None] | None = None,
    moved_fractions: Iterable[float | None] | None = None,
) -> EarlyBirdDetection:
    """When the masks of successive checks had settled: the early-bird ticket of a training that you ran yourself.

    With d(a, b) the fraction of bits in which two masks differ: "window", the last 5 distances between
    neighbouring checks are below 0.1; "queue", the newest mask is within 0.1 of each of the 4 before it;
    "rank_correlation", the rank correlation of neighbouring checks is at least 0.95 three times running. See
    `EarlyBirdDetector` for thresholds at other sparsities and for weights that do not move.

    Args:
        masks: One mask a check, in order; a generator is drawn from only until the ticket has settled.
        criterion: "window", "queue" or "rank_correlation".
        threshold: Largest distance, or least correlation, in (0, 1); None for the criterion's own.
        window: Number of checks that must agree; None for the criterion's own.
        correlations: One for each mask, the first of them None: rank correlation of the magnitudes with the check
            before. Needed for "rank_correlation".
        moved_fractions: One for each mask, None where not known: fraction of weights that changed since the check
            before. Without them weights that stand still look like a ticket that has settled.

    Returns:
        An `EarlyBirdDetection`.

    Raises:
        DetectionError: No masks, not as many correlations or fractions as masks, or what `EarlyBirdDetector`
            refuses.
        MaskMismatchError: Masks of different tensors.

    Example:
        >>> import torch
        >>> from lottery_tickets.detection import detect_early_bird_convergence
        >>> early, late = torch.tensor([1, 1, 0, 0]), torch.tensor([0, 1, 1, 0])
        >>> found = detect_early_bird_convergence({"w": mask} for mask in [early] + [late] * 9)
        >>> found["converged"], found["convergence_check"], found["distances"][:3]
        (True, 6, [(), (0.5,), (0.0,)])

    References:
        You et al., "Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks", ICLR 2020,
        arXiv 1909.11957, section 3.3.
    """
    if criterion == "rank_correlation" and correlations is None:
        raise DetectionError(
            "criterion 'rank_correlation' judges correlations=, one for each mask; none were given."
        )
    detector = EarlyBirdDetector(criterion, threshold=threshold, window=window)
    distances: list[tuple[float, ...]] = []
    mask, verdict = None, None
    for check, (given, rho, moved) in enumerate(_together(masks, correlations, moved_fractions)):
        mask = as_mask(given)
        verdict = detector.update(mask, correlation=rho, moved_fraction=moved)
        distances.append(verdict.distances)
        if verdict.converged:
            return EarlyBirdDetection(
                converged=True,
                convergence_check=check,
                distances=distances,
                final_mask=mask,
                reason=verdict.reason,
            )
    if mask is None or verdict is None:
        raise DetectionError("There are no masks to compare; give one for each check.")
    return EarlyBirdDetection(
        converged=False, convergence_check=None, distances=distances, final_mask=mask, reason=verdict.reason
    )


def _together(
    masks: Iterable[Mapping[str, torch.Tensor]],
    correlations: Iterable[float | None] | None,
    moved_fractions: Iterable[float | None] | None,
) -> Iterator[tuple[Mapping[str, torch.Tensor], float | None, float | None]]:
    """A mask at a time with its figures, None for those not given at all."""
    given = {"correlations": correlations, "moved_fractions": moved_fractions}
    figures = {what: iter(values) for what, values in given.items() if values is not None}
    count = 0
    for count, mask in enumerate(masks, 1):
        here: dict[str, Any] = {what: next(values, _ENDED) for what, values in figures.items()}
        for what, figure in here.items():
            if figure is _ENDED:
                raise DetectionError(f"{what} end before mask {count}; give one for each mask.")
        yield mask, here.get("correlations"), here.get("moved_fractions")
    for what, values in figures.items():
        if next(values, _ENDED) is not _ENDED:
            raise DetectionError(f"There are more {what} than the {count} masks; give one for each mask.")
