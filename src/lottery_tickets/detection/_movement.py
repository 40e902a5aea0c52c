"""How much the weights moved, and how far random movement of the same amount would have taken the mask."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.detection._arguments import checked_integer
from lottery_tickets.detection._shapes import Shapes, checked, shapes_of
from lottery_tickets.errors import DetectionError, WeightsError
from lottery_tickets.masks import Division, PackedBits, Shard, count_different, local_of
from lottery_tickets.sparsity import Selection, check_sparsity, removed_count

_Values = npt.NDArray[np.float64]
_Positions = npt.NDArray[np.int64]

_SAMPLE = 1 << 20
_PERMUTATIONS = 4


@dataclass(frozen=True)
class SampledDistance:
    """Distances of masks drawn on the sample at one sparsity, between the check before and this one.

    Attributes:
        observed: Between the masks before and now.
        observed_error: Its standard error as an estimate for the whole model; 0 if the sample is the model.
        null_distance: Between the masks before and after the same updates, handed out at random within each
            tensor; the mean over a few permutations.
        null_error: Its standard error, from the permutations and from the sampling.
    """

    observed: float
    observed_error: float
    null_distance: float
    null_error: float


@dataclass(frozen=True)
class Movement:
    """What happened to the weights between two checks.

    Attributes:
        moved_fraction: Fraction of the weights whose bits changed; -0.0 and 0.0 count as the same.
        moved_error: Its standard error; 0 if the sample is the model, and the fraction exact.
        sampled: Number of weights looked at.
        by_sparsity: Sparsity to the distances of masks on the sample.
    """

    moved_fraction: float
    moved_error: float
    sampled: int
    by_sparsity: dict[float, SampledDistance] = field(hash=False)


class MovementState(TypedDict):
    """Everything that a `MovementProbe` knows.

    Attributes:
        record: Settings and the number of checks, of types that JSON has.
        tensors: "values": the sampled weights of the last check, float64; empty before the first.
    """

    record: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class MovementProbe:
    """Compares weights with those of the check before, on a fixed sample of them.

    The sample is drawn once, without replacement, from each tensor in proportion to its size; a model no larger
    than the sample is looked at whole, and then the figures are exact. Two questions are answered of it.

    How many weights moved: the fraction whose bits differ. A mask drawn by one threshold differs from the one
    before in at most two bits for each weight that moved, so where little moves, masks agree whatever was learnt.

    How far would random movement have taken the mask: with w the weights before and u = w' - w their updates, the
    updates are permuted within each tensor by a seeded permutation P, and `null_distance` is the mean of
    d(mask(w), mask(w + P u)), sums in float64. It is the distance between two masks that the same amount of
    movement, of the same sizes in the same tensors, makes when it does not know which weight it lands on. That
    gives a distance of 0.1 between two checks its meaning: if `observed`, the distance of the true masks on the
    same sample, is near `null_distance`, masks are close because steps are small, and no closer than by chance; if
    it is well below, large steps spare the ticket.

    The masks are those of one threshold over all tensors, ties broken by position.

    Args:
        tensors: Parameter name to weights; they say which names and shapes to expect, and are not looked at.
        size: Most weights to look at, at least 2; each takes 16 bytes.
        seed: Non-negative integer that chooses the sample and the permutations.
        permutations: How many to average over, at least 2.

    Raises:
        WeightsError: A tensor that has no magnitudes to rank.
        DetectionError: A size, seed or number of permutations that cannot be.

    Example:
        >>> import torch
        >>> from lottery_tickets.detection import MovementProbe
        >>> before = torch.randn(1000, generator=torch.Generator().manual_seed(0))
        >>> probe = MovementProbe({"w": before})
        >>> probe.update({"w": before}, [0.5]) is None
        True
        >>> movement = probe.update({"w": 1.5 * before}, [0.5])
        >>> movement.moved_fraction, movement.by_sparsity[0.5].observed
        (1.0, 0.0)
        >>> movement.by_sparsity[0.5].null_distance > 0.1
        True

    References:
        Cochran, "Sampling Techniques", 3rd edition, 1977, section 3.2 (finite-population correction). Good,
        "Permutation, Parametric and Bootstrap Tests of Hypotheses", 3rd edition, 2005, chapter 3.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        size: int = _SAMPLE,
        seed: int = 0,
        permutations: int = _PERMUTATIONS,
    ) -> None:
        self._shapes = shapes_of(tensors)
        self._size = checked_integer(size, "size", least=2)
        self._seed = checked_integer(seed, "seed", least=0)
        self._permutations = checked_integer(permutations, "permutations", least=2)
        self._numel = sum(shape.numel() for shape in self._shapes.values())
        self._positions = _sample(self._shapes, self._size, self._seed)
        self._before: _Values | None = None
        self._checks = 0

    def update(self, tensors: Mapping[str, torch.Tensor], sparsities: Iterable[float]) -> Movement | None:
        """What moved since the check before; this check takes its place.

        Args:
            tensors: Weights by the same names and in the same shapes as before, on any device.
            sparsities: Those to draw masks at, each in [0, 1); none for the moved fraction alone, which costs
                less.

        Returns:
            A `Movement`; None at the first check.

        Raises:
            WeightsError: NaN or inf in the sample, or other tensors than before.
            SparsityError: A sparsity outside [0, 1).
        """
        removals = {check_sparsity(sparsity): removed_count(sparsity, self.sampled) for sparsity in sparsities}
        now = self._values(checked(tensors, self._shapes))
        before, self._before = self._before, now
        self._checks += 1
        return None if before is None else self._movement(before, now, removals)

    @property
    def sampled(self) -> int:
        """Number of weights looked at."""
        return sum(positions.size for positions in self._positions.values())

    def _movement(self, before: _Values, now: _Values, removals: Mapping[float, int]) -> Movement:
        moved = int(np.count_nonzero(now != before)) / self.sampled if self.sampled else 0.0
        distances: dict[float, SampledDistance] = {}
        if removals:
            ranks = list(removals.values())
            kept = _masks(before, ranks)
            observed = _distances(kept, _masks(now, ranks), self.sampled)
            update = now - before
            nulls = np.array(
                [
                    _distances(kept, _masks(before + self._permuted(update, turn), ranks), self.sampled)
                    for turn in range(self._permutations)
                ]
            )
            for sparsity, seen, null in zip(removals, observed, nulls.T, strict=True):
                mean = float(null.mean())
                scatter = float(null.std(ddof=1)) / math.sqrt(self._permutations)
                distances[sparsity] = SampledDistance(
                    seen, self._error(seen), mean, math.hypot(scatter, self._error(mean))
                )
        return Movement(moved, self._error(moved), self.sampled, distances)

    def _values(self, tensors: Mapping[str, torch.Tensor]) -> _Values:
        """The sampled weights, tensor after tensor, row-major; those in parts come from a rank that has them."""
        division = Division.of(tensors)
        values = np.zeros(self.sampled)
        start = 0
        for name, positions in self._positions.items():
            stop = start + positions.size
            if division is None:
                torch.from_numpy(values[start:stop]).copy_(_at(tensors[name], positions))
            elif name in division.counted:
                which, where = _places_in(division.shards[name], positions)
                values[start:stop][which] = _at(local_of(tensors[name]), where).double().cpu().numpy()
            start = stop
        if division is not None:
            values = division.ranks.sum(values)
        self._check_finite(values)
        return values

    def _check_finite(self, values: _Values) -> None:
        start = 0
        for name, positions in self._positions.items():
            if not np.isfinite(values[start : start + positions.size]).all():
                raise WeightsError(f"{name} holds NaN or inf, whose movement has no size; repair the weights.")
            start += positions.size

    def _permuted(self, update: _Values, turn: int) -> _Values:
        """The updates, shuffled within each tensor, differently at every check and turn."""
        permuted = np.empty_like(update)
        start = 0
        for index, positions in enumerate(self._positions.values()):
            stop = start + positions.size
            source = np.random.Philox(key=self._seed, counter=[0, index, turn + 1, self._checks])
            permuted[start:stop] = np.random.Generator(source).permutation(update[start:stop])
            start = stop
        return permuted

    def _error(self, fraction: float) -> float:
        """Standard error of a fraction of the sample, of a simple random sample without replacement."""
        sampled = self.sampled
        if sampled == self._numel:
            return 0.0
        return math.sqrt(fraction * (1 - fraction) / (sampled - 1) * (1 - sampled / self._numel))

    # ---------------------------------------------------------------- kept and taken up again

    def state_dict(self) -> MovementState:
        """Everything the probe knows: a record that JSON can hold, and the sampled weights, not copied."""
        return MovementState(
            record={**self._settings(), "checks": self._checks},
            tensors={} if self._before is None else {"values": torch.from_numpy(self._before)},
        )

    def load_state_dict(self, state: MovementState) -> None:
        """Go on where another probe of the same settings stopped.

        Args:
            state: What `state_dict` gave, saved and loaded perhaps.

        Raises:
            DetectionError: A state of other settings or other tensors.
        """
        record = dict(state["record"])
        checks = record.pop("checks")
        values = state["tensors"].get("values")
        sampled = self.sampled if checks else None
        if record != self._settings() or sampled != (None if values is None else values.numel()):
            raise DetectionError(
                f"The saved movement is of a probe with {record}, this one has {self._settings()}; make one with "
                "the same settings over the same tensors."
            )
        self._checks = checks
        self._before = None if values is None else values.double().numpy().copy()

    def _settings(self) -> dict[str, Any]:
        return {
            "size": self._size,
            "seed": self._seed,
            "permutations": self._permutations,
            "sampled": {name: positions.size for name, positions in self._positions.items()},
        }


def _at(tensor: torch.Tensor, positions: _Positions) -> torch.Tensor:
    """The elements at these positions in row-major order."""
    if positions.size == tensor.numel():
        return tensor.reshape(-1)
    index = torch.from_numpy(positions).to(tensor.device)
    # take() knows strides, and takes many times as long.
    return tensor.view(-1).index_select(0, index) if tensor.is_contiguous() else torch.take(tensor, index)


def _places_in(shard: Shard, positions: _Positions) -> tuple[_Positions, _Positions]:
    """Which of the positions in the whole tensor are in a part of it, and where in the part they are."""
    found, there = np.ones(positions.size, np.bool_), []
    for index, held in zip(np.unravel_index(positions, tuple(shard.shape)), shard.indices, strict=True):
        place = np.searchsorted(held, index)
        found &= np.append(held, -1)[place] == index
        there.append(place)
    which = np.flatnonzero(found)
    if not which.size:  # of no elements there are no places
        return which, which
    return which, np.ravel_multi_index([place[which] for place in there], tuple(shard.part))


def _masks(values: _Values, removals: Sequence[int]) -> list[PackedBits]:
    """What one threshold keeps of the values, for each number to remove."""
    selection = Selection({"sample": torch.from_numpy(values)})
    return [selection.bits(line)["sample"] for line in selection.lines(removals)]


def _distances(first: Sequence[PackedBits], second: Sequence[PackedBits], numel: int) -> list[float]:
    return [count_different(*pair) / numel if numel else 0.0 for pair in zip(first, second, strict=True)]


def _sample(shapes: Shapes, size: int, seed: int) -> dict[str, _Positions]:
    """Sorted positions in each tensor, in proportion to its size; all of them if they are no more than `size`."""
    numels = {name: shape.numel() for name, shape in shapes.items()}
    total = sum(numels.values())
    counts = numels if total <= size else _shares(numels, size)
    return {
        name: _draw(numels[name], count, np.random.Philox(key=seed, counter=[0, index, 0, 0]))
        for index, (name, count) in enumerate(counts.items())
    }


def _shares(numels: Mapping[str, int], size: int) -> dict[str, int]:
    """`size` in proportion to the numbers: all rounded down, then up from the largest remainder, earlier first."""
    total = sum(numels.values())
    shares = {name: size * numel // total for name, numel in numels.items()}
    waiting = sorted(numels, key=lambda name: -(size * numels[name] % total))
    for name in waiting[: size - sum(shares.values())]:
        shares[name] += 1
    return shares


def _draw(numel: int, count: int, source: np.random.Philox) -> _Positions:
    """`count` of `numel` positions, sorted, every choice equally likely, in memory that `count` alone bounds."""
    if 2 * count > numel:
        kept = np.ones(numel, np.bool_)
        kept[_draw(numel, numel - count, source)] = False
        return np.flatnonzero(kept)
    drawn = np.zeros(0, np.int64)
    while drawn.size < count:
        # Raw output, because a saved run must find the same positions with any later numpy.
        fractions = (source.random_raw(count - drawn.size) >> np.uint64(11)) * 2.0**-53
        drawn = np.concatenate([drawn, np.sort((fractions * numel).astype(np.int64))])
        drawn.sort(kind="stable")  # merges the two sorted runs
        drawn = drawn[np.append(True, drawn[1:] != drawn[:-1])]
    return drawn
