"""Exact quantiles: nearest rank, against a sort in plain Python and against numpy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracles
from lottery_tickets import compute_histogram_quantile
from lottery_tickets.errors import SparsityError, WeightsError
from strategies import DTYPES, tensors

fractions = st.one_of(st.sampled_from((0.0, 0.07, 0.29, 0.5, 0.9, 1.0)), st.floats(0, 1))


@settings(max_examples=150)
@given(tensors().filter(lambda tensor: tensor.numel()), st.lists(fractions, min_size=1, max_size=6))
def test_the_quantile_is_the_value_at_the_nearest_rank(values, asked):
    found = compute_histogram_quantile(values, asked)
    assert (found.dtype, found.shape) == (values.dtype, (len(asked),))
    assert found.tolist() == [oracles.quantile(oracles.flat(values), q) for q in asked]
    assert compute_histogram_quantile(values, asked[0]).tolist() == found[0].tolist()


def test_it_equals_numpys_inverted_cdf():
    values = torch.randn(10_001, generator=torch.Generator().manual_seed(0))
    asked = np.linspace(0, 1, 101)
    expected = np.quantile(values.numpy(), asked, method="inverted_cdf")
    assert compute_histogram_quantile(values, [float(q) for q in asked]).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_there_is_no_size_limit_of_torchs_kind(dtype):
    """torch.quantile refuses 16M elements and more, and bfloat16 altogether."""
    values = (torch.arange(17_000_000) % 1000 - 500).to(dtype)
    assert compute_histogram_quantile(values, 0.25).item() == torch.tensor(-251, dtype=dtype).item()


@pytest.mark.parametrize(("q", "expected"), [(0.07, 7), (0.29, 29), (0.57, 57), (1.0, 100), (0.001, 1), (0.0, 1)])
def test_fractions_are_read_as_decimals(q, expected):
    """0.07 * 100 is 7.000000000000001 in floating point, whose ceiling is 8."""
    assert compute_histogram_quantile(torch.arange(1.0, 101), q).item() == expected


def test_zeros_of_both_signs_are_one_value():
    values = torch.tensor([-0.0, 0.0, -0.0, 1.0])
    assert compute_histogram_quantile(values, [0.25, 0.5, 0.75, 1.0]).tolist() == [0, 0, 0, 1]


def test_infinities_are_the_ends():
    values = torch.tensor([float("inf"), float("-inf"), 0.0])
    assert compute_histogram_quantile(values, [0.0, 0.5, 1.0]).tolist() == [float("-inf"), 0, float("inf")]


@pytest.mark.parametrize("kind", [np.float32, np.float64, Fraction])
def test_a_fraction_may_be_any_real_number(kind):
    assert compute_histogram_quantile(torch.tensor([1.0, 2.0, 3.0, 4.0]), kind(0.5)).item() == 2


def test_the_tensor_is_not_written():
    values = torch.randn(1000, requires_grad=True)
    before = oracles.bytes_of(values)
    compute_histogram_quantile(values, 0.5)
    assert oracles.bytes_of(values) == before


@pytest.mark.parametrize("q", [-0.1, 1.1, float("nan"), float("inf"), "half", None, True, torch.tensor(0.5)])
def test_fractions_outside_are_refused(q):
    with pytest.raises(SparsityError, match=r"fraction in \[0, 1\], got"):
        compute_histogram_quantile(torch.ones(3), q)


@pytest.mark.parametrize("broken", [torch.tensor([1.0, float("nan")]), -torch.tensor([1.0, float("nan")])])
def test_nan_is_refused(broken):
    with pytest.raises(WeightsError, match=r"NaN .* tensor \(1\)"):
        compute_histogram_quantile(broken, 0.1)


def test_an_empty_tensor_has_none():
    with pytest.raises(SparsityError, match="empty"):
        compute_histogram_quantile(torch.empty(0), 0.5)


def test_integers_are_refused():
    with pytest.raises(WeightsError, match=r"torch\.int64"):
        compute_histogram_quantile(torch.arange(3), 0.5)
