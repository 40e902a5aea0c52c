"""Shares of outliers: weights that rank far above the mean of their block, counted block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch

from lottery_tickets.sparsity import _counting
from lottery_tickets.sparsity._blocks import Pages, Weights, flat_range, for_each_run, pattern_of

# Weights added at a time: converted to float64 they stay in the processor's cache.
_RUN = 1 << 17


def outlier_shares(
    tensors: Mapping[str, torch.Tensor], threshold: float, *, pages: Pages | None = None
) -> dict[str, Fraction]:
    """Name to the share of the weights of its block whose magnitude is above `threshold` times the block's mean.

    A block is what OWL calls a layer: the tensors of one transformer block, told by names that agree up to their
    first number ("model.layers.3"); a name without a number is a block of its own.
    """
    shares: dict[str, Fraction] = {}
    for names in _blocks(tensors).values():
        block = {name: tensors[name] for name in names}
        numel = sum(tensor.numel() for tensor in block.values())
        line = threshold * _sum(block, pages) / max(numel, 1)
        outliers = sum(_count_above(tensor, line, pages) for tensor in block.values())
        shares |= dict.fromkeys(names, Fraction(outliers, max(numel, 1)))
    return shares


def _blocks(names: Iterable[str]) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        block = ".".join(parts[: numbers[0] + 1]) if numbers else name
        blocks.setdefault(block, []).append(name)
    return blocks


def _sum(tensors: Mapping[str, torch.Tensor], pages: Pages | None) -> float:
    """Sum of the magnitudes in float64."""
    runs = [
        (tensor, start, min(start + _RUN, tensor.numel()))
        for tensor in tensors.values()
        for start in range(0, tensor.numel(), _RUN)
    ]
    sums = for_each_run(
        lambda run: float(torch.linalg.vector_norm(flat_range(*run), 1, dtype=torch.float64)),
        *(runs, lambda run: flat_range(*run), pages),
    )
    return math.fsum(sums)


def _count_above(tensor: torch.Tensor, line: float, pages: Pages | None) -> int:
    """How many magnitudes are greater than the line."""
    weights = Weights({"": tensor}, pages=pages)
    key = _largest_pattern_upto(line, weights.dtype)
    return sum(weights.for_each(lambda block: int(_counting.above(weights.integers(block), [key])[0])))


def _largest_pattern_upto(line: float, dtype: torch.dtype) -> int:
    """The pattern of the largest magnitude of this type that is not above the line."""
    nearest = float(torch.tensor(line, dtype=dtype))
    return pattern_of(nearest, dtype) - (nearest > line)
