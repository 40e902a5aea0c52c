"""Slow, obvious twins of what the library computes fast. Plain Python on plain lists, one weight after another.

Every floating-point type of torch that the library ranks fits a Python float exactly, so `abs` and `sorted` here
say by value what the library says by bit patterns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch

Tensors = Mapping[str, torch.Tensor]
Weight = tuple[float, int, str, int]  # score, position of the tensor, its name, position in it


def flat(tensor: torch.Tensor) -> list[float]:
    """Values in row-major order, whatever the strides."""

    def walk(values):
        if isinstance(values, list):
            for value in values:
                yield from walk(value)
        else:
            yield values

    return list(walk(tensor.detach().cpu().tolist()))


def magnitude(value: float) -> float:
    """What a weight ranks by; NaN goes before everything, zeros too."""
    return -1.0 if math.isnan(value) else abs(value)


def ranking(tensors: Tensors, importance: Mapping[str, float] | None = None) -> list[Weight]:
    """All weights, the first to be pruned first: by (weighted) magnitude, tensor, position."""
    scales = importance or {}
    return sorted(
        (magnitude(value) if name not in scales else magnitude(value) * scales[name], turn, name, position)
        for turn, (name, tensor) in enumerate(tensors.items())
        for position, value in enumerate(flat(tensor))
    )


def mask_without(tensors: Tensors, pruned: Sequence[Weight]) -> dict[str, torch.Tensor]:
    """True everywhere but at these weights."""
    kept = {name: [True] * tensor.numel() for name, tensor in tensors.items()}
    for _, _, name, position in pruned:
        kept[name][position] = False
    return {
        name: torch.tensor(kept[name], dtype=torch.bool).reshape(tensor.shape) for name, tensor in tensors.items()
    }


def magnitude_mask(
    tensors: Tensors, removed: int, importance: Mapping[str, float] | None = None
) -> dict[str, torch.Tensor]:
    """The `removed` first of the ranking go."""
    return mask_without(tensors, ranking(tensors, importance)[:removed])


def threshold(tensors: Tensors, removed: int, importance: Mapping[str, float] | None = None) -> float:
    """The largest pruned magnitude, 0.0 if nothing is pruned."""
    if not removed:
        return 0.0
    score = ranking(tensors, importance)[removed - 1][0]
    return math.nan if score < 0 else score


def floored_mask(tensors: Tensors, removed: int, min_density: float) -> dict[str, torch.Tensor] | None:
    """Go through the ranking and prune, but pass over tensors with no more to give; None if too few can go."""
    room = {
        name: tensor.numel() - math.ceil(Fraction(str(min_density)) * tensor.numel())
        for name, tensor in tensors.items()
    }
    pruned = []
    for weight in ranking(tensors):
        if len(pruned) < removed and room[weight[2]]:
            room[weight[2]] -= 1
            pruned.append(weight)
    return mask_without(tensors, pruned) if len(pruned) == removed else None


def removals_by_weight(numels: Mapping[str, int], weights: Mapping[str, float], removed: int) -> dict[str, int]:
    """How many go per tensor when its density is min(1, scale * weight), with the scale that fits the total.

    What is kept grows with the scale in straight pieces between the scales at which a tensor is full, so the
    scale lies in the first piece that reaches the total. Remainders: the largest are rounded up, earlier first.
    """
    kept = sum(numels.values()) - removed
    exact = {name: Fraction(weight) for name, weight in weights.items()}

    def kept_at(scale: Fraction) -> Fraction:
        return sum((min(Fraction(1), scale * exact[name]) * numels[name] for name in numels), Fraction(0))

    low = Fraction(0)
    for high in sorted({1 / exact[name] for name in numels}):
        if kept_at(high) >= kept:
            rise = kept_at(high) - kept_at(low)
            scale = low + (high - low) * (kept - kept_at(low)) / rise if rise else high
            break
        low = high
    else:
        scale = low
    shares = {name: numels[name] * (1 - min(Fraction(1), scale * exact[name])) for name in numels}
    removals = {name: math.floor(share) for name, share in shares.items()}
    for name in sorted(shares, key=lambda name: removals[name] - shares[name])[: removed - sum(removals.values())]:
        removals[name] += 1
    return removals


def quantile(values: Sequence[float], q: float) -> float:
    """Nearest rank: the ceil(q * N)-th smallest, the first for q = 0."""
    rank = max(1, math.ceil(Fraction(str(q)) * len(values)))
    return sorted(values)[rank - 1]


def packed(decisions: torch.Tensor) -> bytes:
    """Eight decisions a byte, the first in the lowest bit."""
    bits = flat(decisions)
    out = bytearray((len(bits) + 7) // 8)
    for position, bit in enumerate(bits):
        if bit:
            out[position // 8] |= 1 << position % 8
    return bytes(out)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """The tensor's bits in row-major order, so that -0.0 and NaN payloads count."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().cpu().contiguous().view(-1).view(integers).numpy().tobytes()


# ---------------------------------------------------------------- how much goes where


def by_largest_remainder(exact: Mapping[str, Fraction], total: int) -> dict[str, int]:
    """Whole numbers of this total: all rounded down, then up one by one, the largest remainder first."""
    numbers = {name: math.floor(share) for name, share in exact.items()}
    waiting = list(exact)
    while sum(numbers.values()) < total:
        best = max(waiting, key=lambda name: exact[name] - math.floor(exact[name]))  # the first of equal ones
        waiting.remove(best)
        numbers[best] += 1
    return numbers


def erk_densities(shapes: Mapping[str, Sequence[int]], density: Fraction) -> dict[str, Fraction]:
    """RigL's iteration: find the factor, make the layers dense whose density is largest and passes 1, repeat."""
    numels = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = {name: Fraction(sum(shape), numels[name]) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        sparse = [name for name in shapes if name not in dense]
        if not sparse:
            return dict.fromkeys(shapes, Fraction(1))
        budget = density * sum(numels.values()) - sum(numels[name] for name in dense)
        factor = budget / sum(raw[name] * numels[name] for name in sparse)
        largest = max(raw[name] for name in sparse)
        if factor * largest <= 1:
            return {name: Fraction(1) if name in dense else factor * raw[name] for name in shapes}
        dense |= {name for name in sparse if raw[name] == largest}


def lamp_removals(tensors: Tensors, removed: int) -> dict[str, int]:
    """Score every weight but the largest of each tensor, sort all scores, count the first by tensor."""
    scored = []
    for turn, (name, tensor) in enumerate(tensors.items()):
        squares = [Fraction(value) ** 2 for value in sorted(magnitude(value) for value in flat(tensor))]
        total, scores = Fraction(0), []
        for square in reversed(squares):
            total += square
            scores.append(float(square / total) if total else 0.0)
        scored += [(score, turn, name) for score in scores[:0:-1]]
    lost = dict.fromkeys(tensors, 0)
    for _, _, name in sorted(scored)[:removed]:
        lost[name] += 1
    return lost


def outlier_share(values: Sequence[float], threshold: float) -> Fraction:
    """Share of the values above `threshold` times their mean."""
    line = Fraction(threshold) * sum(map(Fraction, values)) / len(values)
    return Fraction(sum(value > line for value in values), len(values))


def kept_by_number(tensors: Tensors, removals: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """Each tensor without its smallest magnitudes."""
    pruned = []
    for name, tensor in tensors.items():
        pruned += ranking({name: tensor})[: removals[name]]
    return mask_without(tensors, pruned)


def kept_of_row(row: Sequence[float], removed: int) -> list[bool]:
    """Which of these values stay when the smallest go, of equal ones the first."""
    gone = sorted(range(len(row)), key=lambda place: (row[place], place))[:removed]
    return [place not in gone for place in range(len(row))]


def kept_by_row(rows: Sequence[Sequence[float]], removed: int) -> list[list[bool]]:
    """As many gone from every row, the first rows one more."""
    each, more = divmod(removed, len(rows))
    return [kept_of_row(row, each + (turn < more)) for turn, row in enumerate(rows)]


def kept_by_pattern(scores: torch.Tensor, kept: int, group: int, input_dim: int = 1) -> torch.Tensor:
    """Of every `group` values that follow each other along the input dimension, the `kept` largest."""
    lanes = scores.detach().movedim(input_dim, -1)
    decisions = [
        decision
        for lane in lanes.reshape(-1, lanes.shape[-1]).tolist()
        for start in range(0, len(lane), group)
        for decision in kept_of_row(lane[start : start + group], group - kept)
    ]
    return torch.tensor(decisions, dtype=torch.bool).reshape(lanes.shape).movedim(-1, input_dim)
