"""Masks of tensors that several ranks hold in parts: those of the tensors in one piece, bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings

from lottery_tickets import create_magnitude_mask
from lottery_tickets.errors import LotteryTicketError
from lottery_tickets.sparsity import _blocks
from parts import Case, cases, spread, whole_tensors


def drawn(tensors: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = create_magnitude_mask(tensors, progress=False, check_memory=False, **options)
    except LotteryTicketError as error:
        return type(error).__name__, str(error)
    return masks if isinstance(masks, list) else [masks]


def compare(rank: int, case: Case) -> None:
    tensors = whole_tensors(case)
    expected = drawn(tensors, case.options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_blocks, "_SMALLEST_BLOCK", 64)
        patched.setattr(_blocks, "_SCRATCH_BYTES", 1)
        found = drawn(spread(case, tensors), case.options)
    if isinstance(expected, tuple):
        assert found == expected
        return
    for one, other in zip(expected, found, strict=True):
        whole = other.gathered()
        assert whole == one
        assert other.digest() == one.digest()
        assert (other.names, other.shapes, other.layer_kept()) == (one.names, one.shapes, one.layer_kept())
        assert (other.kept, other.numel, other.sparsity) == (one.kept, one.numel, one.sparsity)
        assert other.layer_sparsity() == one.layer_sparsity()


@example(
    case=Case(
        (2,),
        [((3, 8), np.zeros(1, np.int64), torch.float64, 0)],
        [(1,)],
        {"scope": "row", "sparsity": 0.1, "nan": "raise"},
    )
)
@example(
    case=Case(
        (2, 2),
        [((5, 8, 1, 2), np.arange(64), torch.float64, 0), ((1, 5), np.array([0, 1]), torch.bfloat16, 0)],
        [(1,), (0, 1)],
        {"allocation": "lamp", "sparsity": [0.1, 0.8], "nan": "raise"},
    )
)
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_masks_of_parts_are_those_of_the_whole(ranks, case):
    ranks(int(np.prod(case.mesh))).run(compare, case)
