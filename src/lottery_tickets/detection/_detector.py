"""The state machine that says when a ticket has settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from types import EllipsisType
from typing import Any, Literal, TypedDict, get_args

import torch

from lottery_tickets.detection._arguments import checked_between, checked_integer, checked_threshold
from lottery_tickets.detection._distance import differing_bits, settled_threshold
from lottery_tickets.errors import DetectionError, MaskMismatchError
from lottery_tickets.masks import Mask, as_mask
from lottery_tickets.sparsity import check_sparsity, removed_count

Criterion = Literal["window", "queue", "rank_correlation"]

_WINDOWS: dict[Criterion, int] = {"window": 5, "queue": 5, "rank_correlation": 3}
_CORRELATION = 0.95
# Of the weights: fewer that move say nothing about ranks that stay.
_LEAST_MOVED = Fraction(1, 20)
_STATE_VERSION = 1


@dataclass(frozen=True)
class Verdict:
    """What one check says.

    Attributes:
        converged: Whether the ticket has settled by this check.
        distances: Fraction of mask bits that differ from each kept mask, the oldest first; empty at the first
            check.
        layer_distances: Parameter name to the fraction of its bits that differ from the previous mask; empty at
            the first check.
        reason: Why, in words and figures.
    """

    converged: bool
    distances: tuple[float, ...]
    layer_distances: dict[str, float] = field(hash=False)
    reason: str


class DetectorState(TypedDict):
    """Everything a detector knows.

    Attributes:
        record: Settings and figures so far, of types that JSON has.
        masks: The kept masks, the oldest first.
    """

    record: dict[str, Any]
    masks: list[Mask]


class EarlyBirdDetector:
    """Tells, from the masks of successive checks, when the winning ticket has settled.

    With m_t the mask of check t over N weights, d(a, b) = |a xor b| / N, and rho_t the rank correlation of the
    magnitudes of checks t - 1 and t, the ticket has settled at check t under

    - "window" (the paper's text) if d(m_i, m_{i-1}) < threshold for the last `window` = 5 checks i;
    - "queue" (the authors' published code) if d(m_t, m_i) <= threshold for each of the other masks in a queue of
      `window` = 5, the newest among them;
    - "rank_correlation" if rho_i >= threshold = 0.95 for the last `window` = 3 checks i.

    Two masks of sparsity s that have nothing to do with each other differ by 2 s (1 - s) on average, so a distance
    says something only well below that. The default threshold of distances is 0.1 for sparsities 0.3 to 0.7 and
    `0.1 * 2 s (1 - s) / 0.42` beyond, the same share of chance as at 0.3 and 0.7.

    Masks drawn by one threshold change in at most two bits for each weight that moved. While so few weights move
    that this alone keeps a distance within the threshold, settled masks say nothing, and the verdict is "weights
    are not moving"; for "rank_correlation" fewer than one in twenty count as not moving.

    Bits are counted on the packed masks and compared with the threshold, read as the decimal it is written as, in
    whole numbers.

    Args:
        criterion: "window", "queue" or "rank_correlation".
        sparsity: Fraction that the masks remove, in [0, 1), to have the threshold checked before there is a mask;
            by default that of the first mask.
        threshold: Largest distance, or least correlation, in (0, 1); None for the defaults above.
        window: Number of checks that must agree ("queue": masks in the queue, at least 2); None for the defaults.

    Raises:
        DetectionError: An unknown criterion, a window or threshold that cannot be, or a threshold of distances
            that random masks reach.

    Example:
        >>> import torch
        >>> from lottery_tickets import Mask
        >>> from lottery_tickets.detection import EarlyBirdDetector
        >>> detector = EarlyBirdDetector("queue", window=3)
        >>> mask = Mask.from_tensors({"w": torch.tensor([1, 1, 0, 0])})
        >>> [detector.update(mask, moved_fraction=1.0).converged for _ in range(4)]
        [False, False, True, True]
        >>> detector.update(mask, moved_fraction=0.0).reason.partition(":")[0]
        'weights are not moving'

    References:
        You et al., "Drawing Early-Bird Tickets: Towards More Efficient Training of Deep Networks", ICLR 2020,
        arXiv 1909.11957, section 3.3 and algorithm 1.
    """

    def __init__(
        self,
        criterion: Criterion = "window",
        *,
        sparsity: float | None = None,
        threshold: float | None = None,
        window: int | None = None,
    ) -> None:
        if criterion not in get_args(Criterion):
            raise DetectionError(f"criterion is one of {', '.join(get_args(Criterion))}, got {criterion!r}.")
        self._criterion: Criterion = criterion
        self._window = _checked_window(criterion, window)
        self._asked_threshold = None if threshold is None else checked_threshold(threshold)
        self._asked_sparsity = None if sparsity is None else check_sparsity(sparsity)
        self._threshold: Fraction | None = None
        self._masks: deque[Mask] = deque(maxlen=self._window - 1 if criterion == "queue" else 1)
        # One entry for each of the last checks that had one before them.
        self._differing: deque[int] = deque(maxlen=self._window)
        self._correlations: deque[float | None] = deque(maxlen=self._window)
        self._moved: deque[float | None] = deque(maxlen=self._checks_judged)
        self._checks = 0
        if self._by_correlation:
            self._threshold = Fraction(str(_CORRELATION)) if threshold is None else self._asked_threshold
        elif self._asked_sparsity is not None:
            self._threshold = settled_threshold(self._asked_threshold, Fraction(str(self._asked_sparsity)))

    # ---------------------------------------------------------------- looking at it

    @property
    def criterion(self) -> Criterion:
        """The rule."""
        return self._criterion

    @property
    def window(self) -> int:
        """Number of checks, or of masks in the queue, that must agree."""
        return self._window

    @property
    def threshold(self) -> float | None:
        """The threshold; None while a default waits for the sparsity of the first mask."""
        return None if self._threshold is None else float(self._threshold)

    @property
    def checks(self) -> int:
        """Number of checks so far."""
        return self._checks

    @property
    def masks(self) -> tuple[Mask, ...]:
        """The masks that the next one will be compared with, the oldest first."""
        return tuple(self._masks)

    # ---------------------------------------------------------------- a check

    def update(
        self,
        mask: Mapping[str, torch.Tensor],
        *,
        correlation: float | EllipsisType | None = ...,
        moved_fraction: float | None = None,
    ) -> Verdict:
        """Take the mask of a new check.

        An error leaves the detector as it was.

        Args:
            mask: A `Mask` or a plain dict of tensors, over the same weights each time.
            correlation: Rank correlation with the check before, in [-1, 1]; None where it is not defined (at the
                first check, or where all magnitudes rank alike). "rank_correlation" asks for it at every check but
                the first.
            moved_fraction: Fraction of the weights that changed since the check before, in [0, 1]; None if not
                known, and then stillness is not judged.

        Returns:
            A `Verdict`.

        Raises:
            MaskMismatchError: A mask of other tensors, or of another sparsity than the detector was set up for.
            DetectionError: A missing correlation, a figure out of range, a threshold that random masks of the
                first mask's sparsity reach, or a first mask that keeps all or nothing, which cannot change.
        """
        mask = as_mask(mask)
        rho = self._checked_correlation(correlation)
        moved = None if moved_fraction is None else checked_between(moved_fraction, "moved_fraction", 0, 1)
        threshold = self._threshold_for(mask)
        by_mask = [differing_bits(mask, kept) for kept in self._masks]
        differing = [sum(bits.values()) for bits in by_mask]

        self._threshold = threshold
        if by_mask:
            self._differing.append(differing[-1])
            self._correlations.append(rho)
            self._moved.append(moved)
        self._masks.append(mask)
        self._checks += 1
        converged, reason = self._judge(differing, mask.numel, threshold)
        sizes = mask.layer_numel()
        return Verdict(
            converged=converged,
            distances=tuple(bits / mask.numel if mask.numel else 0.0 for bits in differing),
            layer_distances={
                name: bits / sizes[name] if sizes[name] else 0.0
                for name, bits in (by_mask[-1] if by_mask else {}).items()
            },
            reason=reason,
        )

    def _judge(self, differing: list[int], numel: int, threshold: Fraction) -> tuple[bool, str]:
        """Whether the ticket has settled, and why."""
        if self._checks == 1:
            return False, "first check: nothing to compare with"
        if still := self._standing_still(threshold):
            return False, still
        if self._by_correlation:
            return self._judge_correlations()
        queue = self._criterion == "queue"
        distances = [Fraction(bits, numel) for bits in (differing if queue else self._differing)]
        near = sum(self._within(distance, threshold) for distance in distances)
        what = "masks of the queue are within" if queue else "last distances are below"
        found = f"{near} of {self._checks_judged} {what} {float(threshold):.4g}"
        return self._verdict(
            near == self._checks_judged, f"{found}, the largest distance is {float(max(distances)):.4g}"
        )

    def _judge_correlations(self) -> tuple[bool, str]:
        assert self._threshold is not None
        bound = float(self._threshold)
        if self._correlations[-1] is None:
            return False, "rank correlation is not defined: all magnitudes rank alike, or it could not be computed"
        high = sum(rho is not None and rho >= bound for rho in self._correlations)
        found = f"{high} of {self._window} last rank correlations are at least {bound:.4g}"
        return self._verdict(high == self._window, f"{found}, the latest is {self._correlations[-1]:.4g}")

    @staticmethod
    def _verdict(settled: bool, figures: str) -> tuple[bool, str]:
        return settled, f"settled: {figures}" if settled else figures

    def _standing_still(self, threshold: Fraction) -> str | None:
        """Why the masks cannot but agree, if at a judged check too few weights moved; else None."""
        for ago, moved in enumerate(reversed(self._moved)):
            if moved is None:
                continue
            exactly = Fraction(str(moved))
            when = "since the last check" if not ago else f"up to the check {ago} before this one"
            moving = f"weights are not moving: a fraction of {moved:.4g} moved {when}, "
            if self._by_correlation:
                if exactly < _LEAST_MOVED:
                    return f"{moving}and where fewer than {float(_LEAST_MOVED):.4g} move, ranks cannot but agree"
            elif self._within(2 * exactly, threshold):
                return (
                    f"{moving}which lets at most {2 * moved:.4g} of the mask's bits change, within the threshold "
                    f"{float(threshold):.4g} by itself"
                )
        return None

    def _within(self, distance: Fraction, threshold: Fraction) -> bool:
        return distance <= threshold if self._criterion == "queue" else distance < threshold

    @property
    def _by_correlation(self) -> bool:
        return self._criterion == "rank_correlation"

    @property
    def _checks_judged(self) -> int:
        """Comparisons that must agree: a queue of n masks makes n - 1."""
        return self._window - 1 if self._criterion == "queue" else self._window

    # ---------------------------------------------------------------- what may come in

    def _threshold_for(self, mask: Mask) -> Fraction:
        """The threshold, settled by the first mask where the sparsity was not given."""
        if self._checks and self._threshold is not None:
            return self._threshold
        removed, numel = mask.numel - mask.kept, mask.numel
        asked = self._asked_sparsity
        # Rules that draw masks round to whole weights, some of them in every tensor.
        if asked is not None and abs(removed - removed_count(asked, numel)) > len(mask):
            raise MaskMismatchError(
                f"The first mask removes {removed} of {numel} weights, and the detector was set up for sparsity "
                f"{asked}; leave sparsity out to take it from the mask."
            )
        if self._threshold is not None:
            return self._threshold
        return settled_threshold(self._asked_threshold, Fraction(removed, numel) if numel else Fraction(0))

    def _checked_correlation(self, correlation: float | EllipsisType | None) -> float | None:
        if isinstance(correlation, EllipsisType):
            if self._by_correlation and self._checks:
                raise DetectionError(
                    "criterion 'rank_correlation' needs update(mask, correlation=...) at every check but the "
                    "first; MagnitudeRanks.update(tensors) computes it."
                )
            return None
        return None if correlation is None else checked_between(correlation, "correlation", -1, 1)

    # ---------------------------------------------------------------- kept and taken up again

    def state_dict(self) -> DetectorState:
        """Everything the detector knows: a record that JSON can hold, and the kept masks.

        Example:
            >>> import json
            >>> from lottery_tickets.detection import EarlyBirdDetector
            >>> detector = EarlyBirdDetector(sparsity=0.5)
            >>> state = detector.state_dict()
            >>> state["record"] = json.loads(json.dumps(state["record"]))
            >>> EarlyBirdDetector(sparsity=0.5).load_state_dict(state)
        """
        return DetectorState(
            record={
                "version": _STATE_VERSION,
                "settings": self._settings(),
                "threshold": None if self._threshold is None else str(self._threshold),
                "checks": self._checks,
                "differing": list(self._differing),
                "correlations": list(self._correlations),
                "moved": list(self._moved),
            },
            masks=list(self._masks),
        )

    def load_state_dict(self, state: DetectorState) -> None:
        """Go on where another detector of the same settings stopped.

        Args:
            state: What `state_dict` gave; masks may have been saved and loaded.

        Raises:
            DetectionError: A state of another version, of other settings or without its masks.
        """
        record = state["record"]
        if record.get("version") != _STATE_VERSION:
            raise DetectionError(
                f"A detector's state of version {record.get('version')!r}; this library reads {_STATE_VERSION}."
            )
        if record["settings"] != self._settings():
            raise DetectionError(
                f"The state is of a detector with settings {record['settings']}, this one has {self._settings()}; "
                "make one with the same settings."
            )
        expected = min(record["checks"], self._masks.maxlen or 0)
        if len(state["masks"]) != expected:
            raise DetectionError(
                f"After {record['checks']} checks a detector of {self._criterion!r} holds {expected} masks, the "
                f"state has {len(state['masks'])}."
            )
        self._threshold = None if record["threshold"] is None else Fraction(record["threshold"])
        self._checks = record["checks"]
        self._differing = deque(record["differing"], self._differing.maxlen)
        self._correlations = deque(record["correlations"], self._correlations.maxlen)
        self._moved = deque(record["moved"], self._moved.maxlen)
        self._masks = deque(map(as_mask, state["masks"]), self._masks.maxlen)

    def _settings(self) -> dict[str, Any]:
        threshold = self._asked_threshold
        return {
            "criterion": self._criterion,
            "sparsity": self._asked_sparsity,
            "threshold": None if threshold is None else str(threshold),
            "window": self._window,
        }


def _checked_window(criterion: Criterion, window: int | None) -> int:
    if window is None:
        return _WINDOWS[criterion]
    return checked_integer(window, f"window of {criterion!r}", least=2 if criterion == "queue" else 1)
