"""Memory lent to short-lived tensors: never to two at a time, and back when the last view is gone."""

from __future__ import annotations

import gc

import pytest
import torch

from lottery_tickets.masks._buffers import Buffers

SHAPE = torch.Size([16, 4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int8])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (16, 4)])
def test_tensors_are_as_torch_makes_them(dtype, shape):
    made = Buffers().empty(torch.Size(shape), dtype)
    assert (made.dtype, made.shape, made.is_contiguous()) == (dtype, torch.Size(shape), True)
    assert made.data_ptr() % 64 == 0


def test_memory_is_used_again_when_the_tensor_is_gone():
    buffers = Buffers()
    first = buffers.empty(SHAPE, torch.float32)
    address = first.data_ptr()
    del first
    smaller = buffers.empty(torch.Size([7]), torch.bfloat16)
    assert smaller.data_ptr() == address


@pytest.mark.parametrize(
    "hold",
    [lambda made: made.t(), lambda made: made.detach(), lambda made: made[3:].view(-1), lambda made: made.numpy()],
)
def test_memory_is_not_lent_while_a_view_lives(hold):
    buffers = Buffers()
    made = buffers.empty(SHAPE, torch.float32).fill_(1)
    view = hold(made)
    del made
    gc.collect()
    buffers.empty(SHAPE, torch.float32).fill_(2)
    assert (view == 1).all()


def test_two_at_a_time_share_nothing_and_one_buffer_waits():
    buffers = Buffers()
    first, second = (buffers.empty(SHAPE, torch.float32).fill_(number) for number in (1, 2))
    assert (first == 1).all() and (second == 2).all()
    large = buffers.empty(torch.Size([1000]), torch.float32)
    address = large.data_ptr()
    del first, large, second
    assert len(buffers._waiting) == 1
    assert buffers.empty(SHAPE, torch.float32).data_ptr() == address
    assert not buffers._lent or len(buffers._lent) <= 1


def test_tensors_outlive_the_buffers():
    made = Buffers().empty(SHAPE, torch.float32).fill_(3)
    gc.collect()
    assert (made == 3).all()
