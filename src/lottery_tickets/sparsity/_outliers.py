"""Shares of outliers: weights that rank far above the mean of their block, counted block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction

import torch

from lottery_tickets.sparsity._blocks import block_size, flat_range, for_each

_BUFFERS = 4


def outlier_shares(tensors: Mapping[str, torch.Tensor], threshold: float) -> dict[str, Fraction]:
    """Name to the share of the weights of its block whose magnitude is above `threshold` times the block's mean.

    A block is what OWL calls a layer: the tensors of one transformer block, told by names that agree up to their
    first number ("model.layers.3"); a name without a number is a block of its own.
    """
    shares: dict[str, Fraction] = {}
    for names in _blocks(tensors).values():
        block = {name: tensors[name] for name in names}
        numel = sum(tensor.numel() for tensor in block.values())
        outliers = _count_above(block, threshold * _sum(block) / numel) if numel else 0
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


def _sum(tensors: Mapping[str, torch.Tensor]) -> float:
    """Sum of the magnitudes in float64."""
    return math.fsum(
        for_each(lambda run: float(flat_range(*run).double().abs().sum()), list(_runs(tensors.values())))
    )


def _count_above(tensors: Mapping[str, torch.Tensor], line: float) -> int:
    counts = for_each(
        lambda run: int((flat_range(*run).double().abs() > line).sum()), list(_runs(tensors.values()))
    )
    return sum(counts)


def _runs(tensors: Iterable[torch.Tensor]) -> Iterable[tuple[torch.Tensor, int, int]]:
    size = block_size(torch.float64, _BUFFERS)
    for tensor in tensors:
        for start in range(0, tensor.numel(), size):
            yield tensor, start, min(start + size, tensor.numel())
