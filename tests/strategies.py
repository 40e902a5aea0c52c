"""What hypothesis draws: weights of every data type, full of ties and of the values that break comparisons."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import strategies as st

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = {
    torch.bfloat16: (np.int16, torch.int16),
    torch.float16: (np.int16, torch.int16),
    torch.float32: (np.int32, torch.int32),
    torch.float64: (np.int64, torch.int64),
}
SPECIAL = (0.0, -0.0, 1.0, -1.0, 0.5, float("inf"), float("-inf"))


def from_patterns(patterns: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Float tensor with exactly these bits."""
    return torch.from_numpy(patterns.astype(INTEGERS[dtype][0])).view(dtype)


def patterns_of(values: torch.Tensor) -> np.ndarray:
    """The bits of a float tensor."""
    return values.contiguous().view(INTEGERS[values.dtype][1]).numpy()


@st.composite
def palettes(draw: st.DrawFn, dtype: torch.dtype, *, nan: bool) -> np.ndarray:
    """A few bit patterns that weights are picked from: few make many ties."""
    kind = np.iinfo(INTEGERS[dtype][0])
    anything = st.integers(int(kind.min), int(kind.max))
    smallest = st.integers(-3, 3)  # zero, subnormals, and the largest NaN patterns of negative sign
    special = st.sampled_from([int(pattern) for pattern in patterns_of(torch.tensor(SPECIAL, dtype=dtype))])
    near_one = st.integers(-2, 2).map(lambda step: int(patterns_of(torch.tensor([1.0], dtype=dtype))[0]) + step)
    drawn = np.array(
        draw(st.lists(st.one_of(anything, smallest, special, near_one), min_size=1, max_size=12)),
        INTEGERS[dtype][0],
    )
    if not nan:
        drawn = np.where(from_patterns(drawn, dtype).isnan().numpy(), 0, drawn)
    return drawn


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype | None = None, *, nan: bool = False) -> torch.Tensor:
    """A tensor of weights: any data type, zero to four dimensions, sometimes not contiguous, full of ties."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    shape = draw(
        st.one_of(
            st.just(()),
            st.tuples(st.integers(0, 400)),
            st.tuples(st.integers(0, 30), st.integers(0, 30)),
            st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.integers(1, 3)),
        )
    )
    palette = draw(palettes(dtype, nan=nan))
    picked = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).choice(palette, size=shape)
    values = from_patterns(np.atleast_1d(picked), dtype).reshape(shape)
    return draw(st.sampled_from((_as_is, _turned, _with_gaps)))(values)


def _as_is(values: torch.Tensor) -> torch.Tensor:
    return values


def _turned(values: torch.Tensor) -> torch.Tensor:
    """The same values, laid out in memory with the dimensions reversed."""
    backwards = tuple(range(values.dim()))[::-1]
    return values.permute(backwards).contiguous().permute(backwards)


def _with_gaps(values: torch.Tensor) -> torch.Tensor:
    """The same values in every second place of a larger tensor."""
    if not values.dim():
        return values
    wide = torch.zeros(*values.shape[:-1], 2 * values.shape[-1], dtype=values.dtype)
    wide[..., ::2] = values
    return wide[..., ::2]


@st.composite
def weights(draw: st.DrawFn, *, nan: bool = False) -> dict[str, torch.Tensor]:
    """Up to five named tensors, of one data type or of several."""
    dtype = draw(st.one_of(st.none(), st.sampled_from(DTYPES)))
    drawn = draw(st.lists(tensors(dtype, nan=nan), min_size=0, max_size=5))
    return {f"layer{index}.weight": tensor for index, tensor in enumerate(drawn)}


def sparsities() -> st.SearchStrategy[float]:
    """Fractions in [0, 1), the round ones that users type among them."""
    return st.one_of(
        st.sampled_from((0.0, 0.1, 0.25, 0.29, 0.5, 0.9, 0.99, 0.999999)),
        st.floats(0, 1, exclude_max=True, allow_nan=False),
    )
