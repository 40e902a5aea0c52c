"""Shares of outliers: weights that rank far above the mean of their block, counted block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

import numpy as np
import torch

from lottery_tickets.masks import Division
from lottery_tickets.sparsity import _counting
from lottery_tickets.sparsity._blocks import Pages, Weights, pattern_of
from lottery_tickets.sparsity._moments import magnitude_sums


def outlier_shares(
    tensors: Mapping[str, torch.Tensor],
    threshold: float,
    *,
    pages: Pages | None = None,
    division: Division | None = None,
) -> dict[str, Fraction]:
    """Name to the share of the weights of its block whose magnitude is above `threshold` times the block's mean.

    A block is what OWL calls a layer: the tensors of one transformer block, told by names that agree up to their
    first number ("model.layers.3"); a name without a number is a block of its own. The mean is exact.

    Args:
        tensors: Name to weights without NaN and inf.
        threshold: M of OWL.
        pages: What is told where weights will be read, if they lie in files.
        division: How tensors of which these are parts are spread over ranks, all of which then make this call.
    """
    shapes = {name: one.shape for name, one in tensors.items()} if division is None else division.shapes
    sums = magnitude_sums(tensors, pages=pages, division=division)
    blocks = list(_blocks(tensors).values())
    numels = [sum(shapes[name].numel() for name in names) for names in blocks]
    outliers = np.zeros(len(blocks), np.int64)
    for turn, (names, numel) in enumerate(zip(blocks, numels, strict=True)):
        line = Fraction(threshold) * sum(sums[name] for name in names) / max(numel, 1)
        here = [name for name in names if division is None or name in division.counted]
        outliers[turn] = sum(_count_above(tensors[name], line, pages) for name in here)
    if division is not None:
        outliers = division.ranks.sum(outliers)
    return {
        name: Fraction(count, max(numel, 1))
        for names, numel, count in zip(blocks, numels, outliers.tolist(), strict=True)
        for name in names
    }


def _blocks(names: Iterable[str]) -> dict[str, list[str]]:
    blocks: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        block = ".".join(parts[: numbers[0] + 1]) if numbers else name
        blocks.setdefault(block, []).append(name)
    return blocks


def _count_above(tensor: torch.Tensor, line: Fraction, pages: Pages | None) -> int:
    """How many magnitudes are greater than the line."""
    weights = Weights({"": tensor}, dtype=tensor.dtype, pages=pages)
    key = _largest_pattern_upto(line, weights)
    return sum(weights.for_each(lambda block: int(_counting.above(weights.integers(block), [key])[0])))


def _largest_pattern_upto(line: Fraction, weights: Weights) -> int:
    """The pattern of the largest magnitude of this type that is not above the line."""
    if line > Fraction(torch.finfo(weights.dtype).max):
        return weights.infinity
    nearest = pattern_of(float(line), weights.dtype)
    while Fraction(weights.value_of(nearest)) > line:
        nearest -= 1
    while nearest + 1 < weights.infinity and Fraction(weights.value_of(nearest + 1)) <= line:
        nearest += 1
    return nearest
