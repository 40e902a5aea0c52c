"""Exact quantiles of a tensor's values, by counting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import partial

import torch

from lottery_tickets.errors import SparsityError
from lottery_tickets.sparsity._allocation import is_fraction, one_or_many
from lottery_tickets.sparsity._blocks import INTEGERS, Weights, for_each
from lottery_tickets.sparsity._selection import Selection


def compute_histogram_quantile(tensor: torch.Tensor, q: float | Sequence[float]) -> torch.Tensor:
    """Exact nearest-rank quantile: the ceil(q * N)-th smallest value, for tensors of any size.

    Counts bit patterns in memory that does not grow with the tensor, where `torch.quantile` sorts, refuses
    bfloat16 and stops at 16 million elements. The answer is always one of the tensor's values; it equals
    `numpy.quantile(..., method="inverted_cdf")`. `q` is read as the decimal it is written as, so 0.07 of 100
    values is the 7th.

    Args:
        tensor: Values of any shape, bfloat16, float16, float32 or float64, on any device. For a threshold on
            magnitudes pass `tensor.abs()`.
        q: Fraction or fractions in [0, 1]; 0 gives the minimum.

    Returns:
        Tensor of the same dtype and device: zero-dimensional for one `q`, else one value per `q`.

    Raises:
        SparsityError: `q` outside [0, 1], or an empty tensor.
        WeightsError: NaN among the values, or a data type without magnitudes.

    Example:
        >>> import torch
        >>> from lottery_tickets import compute_histogram_quantile
        >>> compute_histogram_quantile(torch.tensor([3.0, -1.0, 2.0, 7.0]), 0.5)
        tensor(2.)
        >>> compute_histogram_quantile(torch.tensor([3.0, -1.0, 2.0, 7.0]), [0.0, 1.0])
        tensor([-1.,  7.])

    References:
        Hyndman and Fan, "Sample Quantiles in Statistical Packages", The American Statistician 50(4), 1996,
        definition 1.
    """
    fractions, single = one_or_many(q)
    for fraction in fractions:
        if not is_fraction(fraction):
            raise SparsityError(f"A quantile is asked for by a fraction in [0, 1], got {fraction!r}.")
    if not tensor.numel():
        raise SparsityError("An empty tensor has no quantiles.")
    below_zero = _count_below_zero(tensor)
    values = []
    for fraction in fractions:
        rank = max(1, math.ceil(Fraction(str(fraction)) * tensor.numel()))
        values.append((rank <= below_zero, below_zero - rank + 1 if rank <= below_zero else rank - below_zero))
    found = _magnitudes(tensor, values)
    quantiles = torch.tensor(found, dtype=tensor.dtype, device=tensor.device)
    return quantiles[0] if single else quantiles


def _count_below_zero(tensor: torch.Tensor) -> int:
    """Values whose sign bit is set; -0.0 sorts just below +0.0."""
    weights = Weights({"tensor": tensor})
    return sum(for_each(lambda block: int((weights.integers(block) < 0).sum()), weights.blocks))


def _magnitudes(tensor: torch.Tensor, signed_ranks: list[tuple[bool, int]]) -> list[float]:
    """The magnitude at each rank among the values of one sign, with that sign."""
    answers: dict[tuple[bool, int], float] = {}
    for negative in (True, False):
        ranks = [rank for sign, rank in signed_ranks if sign == negative]
        # Every value is looked at, and NaN of either sign refused, even where one sign answers all.
        selection = Selection({"tensor": tensor}, rescore=partial(_of_sign, negative=negative))
        found = selection.kth_smallest(ranks)
        for rank, (magnitude, _) in zip(ranks, found, strict=True):
            answers[negative, rank] = -magnitude if negative else magnitude
    return [answers[signed_rank] for signed_rank in signed_ranks]


def _of_sign(_name: str, values: torch.Tensor, *, negative: bool) -> torch.Tensor:
    """Values of this sign and NaN as they are; the others behind all of them, at infinity."""
    keep = ((values.contiguous().view(INTEGERS[values.dtype]) < 0) == negative) | values.isnan()
    return torch.where(keep, values, float("inf"))
