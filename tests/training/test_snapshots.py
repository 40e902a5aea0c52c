"""The digest of a model's numbers: the same for the same bits, and only for those."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_tickets.training import digest_of, tensors_of
from strategies import tensors


@given(tensors(nan=True), tensors(nan=True))
def test_a_digest_is_that_of_the_bits(first, second):
    digest = digest_of({"a": first, "b": second})
    assert digest_of({"b": second.clone(), "a": first.contiguous()}) == digest, "whatever their order and strides"
    assert digest_of({"a": first}) != digest
    if first.numel():
        changed = first.clone()
        flat = changed.reshape(-1)
        flat.view(torch.uint8)[0] ^= 1
        assert digest_of({"a": flat.reshape(first.shape), "b": second}) != digest


@given(st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]))
def test_zeros_of_two_signs_differ(dtype):
    zero = torch.zeros(1, dtype=dtype)
    assert digest_of({"a": zero}) != digest_of({"a": -zero})


def test_names_shapes_and_data_types_count():
    digests = {
        digest_of({"a": torch.zeros(4)}),
        digest_of({"b": torch.zeros(4)}),
        digest_of({"a": torch.zeros(2, 2)}),
        digest_of({"a": torch.zeros(4, dtype=torch.int32)}),
        digest_of({"a": torch.zeros(0)}),
        digest_of({"a": torch.tensor(0.0)}),
        digest_of({"a": torch.zeros(16, dtype=torch.bool)}),
    }
    assert len(digests) == 7


def test_buffers_are_numbers_of_a_model():
    model = torch.nn.BatchNorm1d(3)
    before = digest_of(tensors_of(model))
    model(torch.randn(4, 3))
    assert digest_of(tensors_of(model)) != before
