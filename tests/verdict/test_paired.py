"""Paired statistics against scipy's, and the estimate of seeds against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from lottery_tickets._verdict._paired import MANY, POWER, lower_bound, mean_of, p_above, seeds_needed, t_interval

NUMBERS = st.lists(st.floats(-10, 10, allow_nan=False).map(lambda one: round(one, 6)), min_size=2, max_size=12)
SPREAD = NUMBERS.filter(lambda values: max(values) - min(values) > 1e-6)
NULLS = st.floats(-5, 5).map(lambda one: round(one, 3))
CONFIDENCES = st.sampled_from([0.6, 0.8, 0.9, 0.95, 0.99, 0.999])


@given(SPREAD, CONFIDENCES)
def test_the_interval_is_scipys(values, confidence):
    expected = stats.ttest_1samp(values, 0).confidence_interval(confidence)
    assert t_interval(values, confidence) == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)


@given(SPREAD, NULLS)
def test_the_p_value_is_scipys(values, null):
    expected = stats.ttest_1samp(values, null, alternative="greater").pvalue
    assert p_above(values, null) == pytest.approx(expected, rel=1e-7, abs=1e-12)


@given(SPREAD, SPREAD)
def test_of_differences_it_is_the_paired_test(first, second):
    count = min(len(first), len(second))
    pairs = list(zip(first[:count], second[:count], strict=True))
    gains = [a - b for a, b in pairs]
    assume(max(gains) - min(gains) > 1e-6)
    expected = stats.ttest_rel(*zip(*pairs, strict=True), alternative="greater")
    assert p_above(gains, 0.0) == pytest.approx(expected.pvalue, rel=1e-7, abs=1e-12)


@given(SPREAD, CONFIDENCES)
def test_the_lower_bound_is_scipys_one_sided(values, confidence):
    expected = stats.ttest_1samp(values, 0, alternative="greater").confidence_interval(confidence).low
    assert lower_bound(values, confidence) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(NUMBERS, NULLS, CONFIDENCES)
def test_a_null_is_refuted_exactly_below_the_bound(values, null, confidence):
    bound = lower_bound(values, confidence)
    refuted = p_above(values, null) <= 1 - confidence
    if bound is None:
        assert not refuted
    else:
        assume(abs(bound - null) > 1e-9)
        assert refuted == (bound > null)


@given(st.floats(-1, 1), st.integers(2, 12))
def test_without_a_spread_it_is_the_sign_test(value, count):
    assume(abs(value) > 1e-6)
    signs = sum(one > 0 for one in [value] * count)
    expected = stats.binomtest(signs, count, alternative="greater").pvalue
    assert p_above([value] * count, 0.0) == pytest.approx(expected)


def test_a_spread_that_is_rounding_is_none():
    """0.9 - 0.8 and 1.1 - 1.0 are 0.1 but for their last bits, and no t test may live on those."""
    gains = [0.9 - 0.8, 1.1 - 1.0, 0.3 - 0.2]
    assert len(set(gains)) > 1
    assert p_above(gains, 0.0) == 0.125
    assert p_above(gains, 0.1) == 1.0
    assert lower_bound(gains, 0.95) is None


def test_ties_show_nothing():
    assert p_above([0.0, 0.0, 0.0, 0.0, 0.0], 0.0) == 1.0
    assert p_above([0.0] * 5, -0.01) == 0.5**5


def test_the_interval_of_equal_values_has_no_width():
    assert t_interval([0.25, 0.25, 0.25], 0.95) == (0.25, 0.25)


@given(SPREAD, NULLS, CONFIDENCES)
def test_more_seeds_are_needed_where_these_did_not_suffice(values, null, confidence):
    needed, mean = seeds_needed(values, null, confidence), mean_of(values)
    if p_above(values, null) > 1 - confidence:
        assert needed is None or needed > len(values)
    if needed is None:
        assert mean <= null + 1e-9
    else:
        assert 2 <= needed <= MANY + 1


def test_the_seeds_needed_give_the_power():
    """Experiments of as many seeds as are needed show the effect at the stated rate, one fewer too rarely."""
    values = [0.5 + shift for shift in (-1.0, 0.0, 1.0)]
    needed = seeds_needed(values, 0.0, 0.95)
    stream = np.random.default_rng(5)
    rates = {}
    for seeds in (needed, needed - 4):
        draws = stream.normal(0.5, 1.0, (4000, seeds))
        rates[seeds] = np.mean(stats.ttest_1samp(draws, 0, axis=1, alternative="greater").pvalue <= 0.05)
    assert rates[needed] == pytest.approx(POWER, abs=0.025)
    assert rates[needed - 4] < POWER - 0.02


def test_the_seeds_needed_end_somewhere():
    assert seeds_needed([1e-6, 1.0, -1.0], 0.0, 0.95) == MANY + 1
    assert seeds_needed([-0.1, 0.0, -0.2], 0.0, 0.95) is None
    assert seeds_needed([0.0, 0.0], 0.0, 0.95) is None
    assert seeds_needed([0.1, 0.1], 0.0, 0.95) == 5 == math.ceil(math.log(0.05, 0.5))
