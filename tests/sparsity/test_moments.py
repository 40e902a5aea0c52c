"""Exact sums of magnitudes and of their squares, against fractions added up one by one."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lottery_tickets.sparsity import _blocks, lamp_removals, outlier_shares
from lottery_tickets.sparsity._moments import Span, cells_of, leading_span, magnitude_sums
from strategies import tensors


def finite(values: torch.Tensor) -> torch.Tensor:
    return torch.where(values.isfinite(), values, 0)


def squares(values: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) ** 2 for value in sorted(map(abs, oracles.flat(values)))]


@settings(max_examples=150)
@given(tensors().map(finite), st.data())
def test_sums_are_exact(values, data):
    assert magnitude_sums({"w": values}) == {"w": sum(Fraction(abs(one)) for one in oracles.flat(values))}
    spans = [leading_span(values.dtype)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_blocks, "_SMALLEST_BLOCK", 64)
        patched.setattr(_blocks, "_SCRATCH_BYTES", 1)
        (cells,) = cells_of({"w": values}, {"w": spans}).values()
    ordered = squares(values)
    while True:
        place = data.draw(st.integers(0, len(cells.starts)))
        above = int(cells.counts[:place].sum())
        assert cells.squares_from([place, 0]) == [sum(ordered[above:]), sum(ordered)]
        wide = (cells.shifts > 0).nonzero()[0][:3].tolist()
        if not wide:
            break
        starts, shifts = cells.starts[wide].tolist(), cells.shifts[wide].tolist()
        again = [
            Span(start, start + (1 << shift) - 1, max(0, shift - 12))
            for start, shift in zip(starts, shifts, strict=True)
        ]
        cells = cells.refined(cells_of({"w": values}, {"w": again})["w"])


def test_sums_do_not_hang_on_an_order():
    """Numbers whose sums in float64 differ with it."""
    torch.manual_seed(0)
    layers = {f"layers.{turn}.weight": torch.randn(40, 50) * 10.0 ** (3 * turn) for turn in range(3)}
    layers["layers.0.weight"][:5] *= 1e-6
    layers["layers.1.weight"][::2] = layers["layers.1.weight"][1::2]
    turned = {name: one.reshape(-1)[torch.randperm(one.numel())] for name, one in layers.items()}
    removals = list(range(1, 5997, 97))
    assert lamp_removals(layers, removals) == lamp_removals(turned, removals)
    assert outlier_shares(layers, 2.0) == outlier_shares(turned, 2.0)
