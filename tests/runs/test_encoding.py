"""Nested state to JSON and tensors and back; random streams that go on where they stood."""

from __future__ import annotations

import json
import math
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lottery_tickets.errors import RunFolderError
from lottery_tickets.runs import RandomState, decoded, encoded, private_random_state, seed_everything


def there_and_back(value):
    tensors = {}
    text = json.dumps(encoded(value, tensors, "it"))
    return decoded(json.loads(text), tensors)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"a": [1, (2.5, "x", True)], 3: {}, "3": ()},
        {"map": 1, "tensor": {"tuple": []}},
        {"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}, 1: torch.ones(2), "1": torch.zeros(2)},
        {
            "state": {0: {"step": torch.tensor(3.0), "average": torch.ones(2, 3).bfloat16()}},
            "groups": [{"lr": 1e-3}],
        },
    ],
)
def test_what_goes_in_comes_out(value):
    assert same(value, there_and_back(value))


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.builds(
        lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
        st.lists(st.integers(0, 3), max_size=3),
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
    )
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(NESTED)
def test_whatever_goes_in_comes_out(value):
    assert same(value, there_and_back(value))


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_state_of_torchs_optimizers(make):
    model = torch.nn.Linear(3, 2)
    optimizer = make(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, 10)
    for _ in range(3):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        scheduler.step()
    assert same(optimizer.state_dict(), there_and_back(optimizer.state_dict()))
    assert same(scheduler.state_dict(), there_and_back(scheduler.state_dict()))


def test_other_mappings_become_dicts():
    assert there_and_back(OrderedDict(a=1)) == {"a": 1}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"f": {"g": print}}, r"it\.f\.g is of type builtin_function"),
        ({(1, 2): 3}, r"it has the key \(1, 2\)"),
        ([torch.nn.UninitializedParameter()], r"it\.0 is a UninitializedParameter"),
    ],
)
def test_what_cannot_be_written_is_named(value, message):
    with pytest.raises(RunFolderError, match=message):
        encoded(value, {}, "it")


def draws() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(1).item(), random.gauss(0, 1), np.random.randn()]


def test_streams_go_on_where_they_stood():
    seed_everything(3)
    draws()
    state = RandomState.now()
    expected = [draws() for _ in range(3)]
    again = RandomState(**there_and_back(vars(state)))
    seed_everything(4)
    again.restore()
    assert [draws() for _ in range(3)] == expected


def test_every_combination_of_seeds_is_a_stream_of_its_own():
    found = []
    for parts in [(0, 1), (1, 0), (1, 1), (2, 0)]:
        seed_everything(*parts)
        found.append(tuple(draws()))
    assert len({one[0] for one in found}) == len({one[1] for one in found}) == len({one[2] for one in found}) == 4
    assert seed_everything(0, 1) == seed_everything(0, 1) < 1 << 63


def test_a_private_state_is_not_seen_outside():
    seed_everything(5)
    expected = draws()
    seed_everything(5)
    with pytest.raises(ValueError, match="inside"), private_random_state():
        seed_everything(6)
        draws()
        raise ValueError("inside")
    assert draws() == expected
