"""Rounding up or down by chance, so that what is lost on the way averages out.

The chance of an element depends on a seed, the step, the parameter and the element's place, and on nothing else:
not on threads, blocks or devices. Its noise is splitmix64's: a counter, multiplied and mixed. numba does it on the
CPU, the same integer operations in torch elsewhere.
"""

from __future__ import annotations

import numpy as np
import torch

_MASK = (1 << 64) - 1
_STRIDE = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def key_of(*parts: int) -> int:
    """A number of 64 bits for (seed, step, parameter, ...): where its elements' counters start."""
    key = 0
    for part in parts:
        key = (key + _STRIDE + part) & _MASK
        key = ((key ^ (key >> 30)) * _MULTIPLIERS[0]) & _MASK
        key = ((key ^ (key >> 27)) * _MULTIPLIERS[1]) & _MASK
        key ^= key >> 31
    return key


def round_stochastically(values: torch.Tensor, dtype: torch.dtype, key: int, start: int) -> torch.Tensor:
    r"""Round to one of the two neighbours in `dtype`, on average without error.

    $$P(\text{up}) = \frac{x - x_\text{down}}{x_\text{up} - x_\text{down}}$$

    exactly (in float16 below $2^{-64}$ to within $2^{-64}$). What `dtype` holds exactly never changes, infinities,
    the sign of zero and NaN pass. As in IEEE's rounding, the number after the largest finite one is infinity.

    Args:
        values: float32, one-dimensional and contiguous.
        dtype: bfloat16 or float16.
        key: See `key_of`.
        start: Place of the first value in its tensor.

    Returns:
        The rounded values, new.
    """
    position = (key + start * _STRIDE) & _MASK
    if values.is_cpu:
        return _with_numba(values, dtype, position)
    return _with_torch(values, dtype, position)


def _with_numba(values: torch.Tensor, dtype: torch.dtype, position: int) -> torch.Tensor:
    from lottery_tickets import _kernels

    rounded = torch.empty_like(values, dtype=dtype)
    rounding = _kernels.round_to_bfloat16 if dtype == torch.bfloat16 else _kernels.round_to_float16
    rounding(
        values.view(torch.int32).numpy().view(np.uint32),
        np.uint64(position),
        np.uint64(_STRIDE),
        rounded.view(torch.int16).numpy().view(np.uint16),
    )
    return rounded


def _with_torch(values: torch.Tensor, dtype: torch.dtype, position: int) -> torch.Tensor:
    places = torch.arange(values.numel(), device=values.device) * _signed(_STRIDE) + _signed(position)
    noise, bits = _noise(places), values.view(torch.int32).long() & 0xFFFFFFFF
    patterns = _to_bfloat16(bits, noise) if dtype == torch.bfloat16 else _to_float16(bits, noise)
    return patterns.to(torch.int16).view(dtype)


def _to_bfloat16(bits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    not_a_number = (bits & 0x7FFFFFFF) > 0x7F800000
    return torch.where(not_a_number, (bits >> 16) | 0x7FC0, (bits + _shifted(noise, 48)) >> 16)


def _to_float16(bits: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    magnitudes = bits & 0x7FFFFFFF
    normal = (magnitudes - 0x38000000 + _shifted(noise, 51)) >> 13
    exponents = (magnitudes >> 23).clamp(min=1)
    digits, cut = magnitudes - ((exponents - 1) << 23), 126 - exponents
    near = cut.clamp(14, 63)  # how far a shift of 64 bits goes; digits have 24
    whole = digits >> near
    drawn = (noise >> (64 - near)) & ((1 << near) - 1)
    up = torch.where(cut < 64, drawn < digits - (whole << near), _below(noise, digits >> (cut - 64).clamp(0, 63)))
    small = whole + up
    patterns = torch.where(magnitudes >= 0x38800000, normal, small)
    patterns = torch.where(magnitudes >= 0x47800000, 0x7C00, patterns)
    patterns = torch.where(magnitudes > 0x7F800000, 0x7E00, patterns)
    return patterns | ((bits >> 16) & 0x8000)


def _noise(places: torch.Tensor) -> torch.Tensor:
    bits = places
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        bits = (bits ^ _shifted(bits, shift)) * _signed(multiplier)
    return bits ^ _shifted(bits, 31)


def _shifted(bits: torch.Tensor, places: int) -> torch.Tensor:
    """To the right, zeros coming in from the left."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _below(noise: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Whether noise, read without a sign, is less than limits that are not negative."""
    return (noise >= 0) & (noise < limits)


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits
