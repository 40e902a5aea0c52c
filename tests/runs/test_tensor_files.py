"""Tensors into a file one after another: what the safetensors library reads, bit for bit."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lottery_tickets.errors import RunFolderError
from lottery_tickets.runs import write_tensors
from oracles import bytes_of

DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64),
    *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]


class InPieces:
    """What another process has a part of."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self._tensor, self.calls = tensor, 0

    def whole(self) -> torch.Tensor | None:
        self.calls += 1
        return self._tensor.clone()


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in draw(st.lists(st.text(min_size=1, max_size=5), unique=True, max_size=6)):
        shape = draw(st.lists(st.integers(0, 4), max_size=3))
        bits = torch.randint(0, 256, (8 * math.prod(shape),), dtype=torch.uint8)
        dtype = draw(st.sampled_from(DTYPES))
        one = (bits & 1).bool() if dtype is torch.bool else bits.view(dtype)
        one = one[: math.prod(shape)].view(shape)
        found[name] = InPieces(one) if draw(st.booleans()) else one.mT if one.dim() > 1 else one
    return found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(tensors())
def test_any_tensors_are_read_as_they_were(tmp_path, tensors):
    path = tmp_path / "some.safetensors"
    write_tensors(tensors, path)
    expected = {name: one.whole() if isinstance(one, InPieces) else one for name, one in tensors.items()}
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        assert (found[name].dtype, found[name].shape) == (one.dtype, one.shape)
        assert bytes_of(found[name]) == bytes_of(one)


def test_who_does_not_write_gives_its_parts_in_the_same_order(tmp_path):
    order: list[str] = []

    class Noted(InPieces):
        def whole(self) -> torch.Tensor | None:
            order.append(str(self.dtype))
            return super().whole()

    tensors = {str(dtype): Noted(torch.zeros(2, dtype=dtype)) for dtype in DTYPES}
    write_tensors({**tensors, "plain": torch.zeros(2)}, None)
    helped, order[:] = list(order), []
    write_tensors({**tensors, "plain": torch.zeros(2)}, tmp_path / "some.safetensors")
    assert order == helped
    assert len(order) == len(DTYPES)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    alive: list[Any] = []

    class Counted(InPieces):
        def whole(self) -> torch.Tensor | None:
            assert [one() for one in alive] == [None] * len(alive)
            made = super().whole()
            alive.append(weakref.ref(made))
            return made

    write_tensors({str(index): Counted(torch.ones(100)) for index in range(4)}, tmp_path / "some.safetensors")
    assert len(alive) == 4


def test_a_type_that_the_format_lacks_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"wide is of torch\.complex128, which no safetensors file can hold"):
        write_tensors({"wide": torch.zeros(1, dtype=torch.complex128)}, tmp_path / "some.safetensors")
