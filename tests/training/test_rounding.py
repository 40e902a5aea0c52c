"""Stochastic rounding: to a neighbour, with exactly the right chance, the same on every way of computing it."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_tickets import _kernels
from lottery_tickets.training._rounding import (
    _MASK,
    _MULTIPLIERS,
    _STRIDE,
    _noise,
    _with_numba,
    _with_torch,
    key_of,
    round_stochastically,
)
from strategies import from_patterns, patterns_of

HALVES = (torch.bfloat16, torch.float16)
KERNELS = {torch.bfloat16: _kernels.round_to_bfloat16, torch.float16: _kernels.round_to_float16}
LARGEST = {torch.bfloat16: Fraction(2) ** 128, torch.float16: Fraction(2) ** 16}  # the first that is not there


def words() -> st.SearchStrategy[int]:
    return st.integers(0, _MASK)


def floats() -> st.SearchStrategy[list[int]]:
    """float32 patterns; those around the edges of float16 and bfloat16 among them."""
    edges = [
        0x33000000,
        0x33800000,
        0x38800000,
        0x477FE000,
        0x477FFFFF,
        0x47800000,
        0x7F7F0000,
        0x7F7FFFFF,
        0x7F800000,
    ]
    near = st.builds(lambda edge, step: edge + step, st.sampled_from(edges), st.integers(-3, 3))
    magnitudes = st.one_of(
        st.integers(0, 0x7FFFFFFF), st.integers(0x1F000000, 0x48000000), near, st.integers(0, 9)
    )
    return st.lists(st.builds(lambda bits, sign: bits - sign * 2**31, magnitudes, st.booleans()), max_size=70)


def values_of(patterns: list[int]) -> torch.Tensor:
    return from_patterns(np.array(patterns, np.int32), torch.float32)


def neighbours(value: Fraction, dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """The multiples of the spacing around a magnitude, by the definition of the format."""
    digits, smallest = (8, -133) if dtype == torch.bfloat16 else (11, -24)
    exponent = smallest
    while value >= Fraction(2) ** (exponent + digits):
        exponent += 1
    spacing = Fraction(2) ** exponent
    below = value // spacing * spacing
    return below, below if below == value else below + spacing


@given(floats(), words(), st.sampled_from(HALVES))
def test_a_value_goes_to_a_neighbour_and_stays_if_it_can(patterns, key, dtype):
    values = values_of(patterns)
    rounded = round_stochastically(values, dtype, key, 0)
    for value, result in zip(values.tolist(), rounded.float().tolist(), strict=True):
        if value != value:  # noqa: PLR0124
            assert result != result  # noqa: PLR0124
        elif abs(value) == float("inf"):
            assert result == value
        else:
            allowed = neighbours(abs(Fraction(value)), dtype)
            found = LARGEST[dtype] if abs(result) == float("inf") else abs(Fraction(result))
            assert min(found, LARGEST[dtype]) in {min(one, LARGEST[dtype]) for one in allowed}
            assert np.signbit(result) == np.signbit(value)


@given(floats(), words(), st.integers(0, 2**40), st.sampled_from(HALVES))
def test_numba_and_torch_give_the_same_bits(patterns, key, start, dtype):
    values, position = values_of(patterns), (key + start * _STRIDE) & _MASK
    compiled, plain = (way(values, dtype, position) for way in (_with_numba, _with_torch))
    np.testing.assert_array_equal(patterns_of(compiled), patterns_of(plain))


@given(floats(), words(), st.integers(1, 9), st.sampled_from(HALVES))
def test_pieces_round_as_the_whole(patterns, key, size, dtype):
    values = values_of(patterns)
    whole = round_stochastically(values, dtype, key, 5)
    pieces = [
        round_stochastically(values[start : start + size], dtype, key, 5 + start)
        for start in range(0, len(values), size)
    ]
    assert not pieces or patterns_of(torch.cat(pieces)).tolist() == patterns_of(whole).tolist()


@pytest.mark.parametrize("dtype", HALVES)
def test_every_pattern_of_the_type_stays(dtype):
    everything = from_patterns(np.arange(-(2**15), 2**15), dtype)
    numbers = everything[~everything.isnan()]
    rounded = round_stochastically(numbers.float(), dtype, 12345, 0)
    np.testing.assert_array_equal(patterns_of(rounded), patterns_of(numbers))


def test_the_noise_is_splitmix64():
    """Its published outputs from seed 0."""
    places = torch.arange(1, 4) * (_STRIDE - 2**64)
    assert [int(word) & _MASK for word in _noise(places)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]


def places_of(noise: np.ndarray) -> np.ndarray:
    """The counters whose noise this is: each step of the mixing undone."""

    def unshifted(bits: np.ndarray, places: int) -> np.ndarray:
        result = bits
        for _ in range(64 // places + 1):
            result = bits ^ (result >> np.uint64(places))
        return result

    bits = unshifted(noise, 31)
    for shift, multiplier in zip((27, 30), reversed(_MULTIPLIERS), strict=True):
        bits = unshifted(bits * np.uint64(pow(multiplier, -1, 1 << 64)), shift)
    return bits


@pytest.mark.parametrize(
    ("value", "dtype", "bits"),
    [
        (1.0 + 2**-7 * 0.3, torch.bfloat16, 16),
        (-1.7e-39, torch.bfloat16, 16),  # subnormal in both types
        (3.0001e38, torch.bfloat16, 16),
        (3.402e38, torch.bfloat16, 16),  # between the largest finite number and where infinity stands
        (0.1, torch.float16, 13),
        (-65519.0, torch.float16, 13),
        (2**-14 * 0.77, torch.float16, 14),
        (-(2**-15) * 0.77, torch.float16, 15),
    ],
)
def test_the_chance_is_the_exact_fraction(value, dtype, bits):
    """All noise there is, each once: the number of ups is the fraction times that number."""
    values = torch.tensor([value])
    magnitude = abs(Fraction(values.item()))
    below, above = neighbours(magnitude, dtype)
    noise = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
    pattern, out = patterns_of(values).view(np.uint32), np.empty(1 << bits, np.uint16)
    for index, place in enumerate(places_of(noise)):
        KERNELS[dtype](pattern, place, np.uint64(_STRIDE), out[index : index + 1])
    results = from_patterns(out.view(np.int16), dtype).float().abs()
    ups = int((results > float(below)).sum())
    assert Fraction(ups, 1 << bits) == (magnitude - below) / (above - below)


def test_tiny_values_of_float16_go_up_as_often_as_they_should():
    """Below the smallest subnormal; Hoeffding: 200,000 draws stray by 0.006 with chance 2e-6."""
    draws = round_stochastically(torch.full((200_000,), 2**-24 * 0.3), torch.float16, 7, 0).float()
    assert abs(float((draws > 0).float().mean()) - 0.3) < 0.006
    assert not round_stochastically(torch.full((200_000,), 1e-30), torch.float16, 7, 0).any()


def test_keys_tell_seeds_steps_and_parameters_apart():
    keys = {key_of(*parts) for parts in np.ndindex(12, 12, 12)}
    assert len(keys) == 12**3
    assert key_of(1, 2) != key_of(2, 1)
    assert 0 <= key_of(-5, 2**80) <= _MASK
