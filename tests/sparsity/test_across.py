"""Masks of tensors that several ranks hold in parts: those of the tensors in one piece, bit for bit."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from lottery_tickets import create_magnitude_mask
from lottery_tickets.errors import LotteryTicketError
from lottery_tickets.sparsity import _blocks
from strategies import DTYPES, from_patterns, palettes, sparsities

MESHES = ((1,), (2,), (4,), (2, 2))


class Case(NamedTuple):
    """Tensors, how they are spread, and what is asked of them.

    Attributes:
        mesh: Its shape.
        tensors: For each its shape, bit patterns to pick from, data type and seed.
        placements: For each and each dimension of the mesh, the dimension that is sharded, or None; one alone is
            of the mesh's last dimension, along the others of which there are copies.
        options: Of `create_magnitude_mask`.
    """

    mesh: tuple[int, ...]
    tensors: list[tuple[tuple[int, ...], np.ndarray, torch.dtype, int]]
    placements: list[tuple[int | None, ...]]
    options: dict[str, Any]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A few tensors full of ties, spread in every way, and a question."""
    mesh = draw(st.sampled_from(MESHES))
    tensors, placements = [], []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(7,), (3, 8), (19, 24), (2, 4), (1, 5), (6, 4, 3), (5, 8, 1, 2), (0, 4)]))
        dtype = draw(st.sampled_from(DTYPES))
        palette = draw(palettes(dtype, nan=draw(st.booleans())))
        tensors.append((shape, palette, dtype, draw(st.integers(0, 1000))))
        dims = draw(st.sampled_from([1, len(mesh)]))
        placements.append(tuple(draw(st.sampled_from([None, *range(len(shape))])) for _ in range(dims)))
    options: dict[str, Any] = draw(
        st.sampled_from(
            [
                {},
                {"scope": "layer"},
                {"scope": "row"},
                {"min_density": 0.2},
                {"allocation": "uniform"},
                {"allocation": "erk", "scope": "row"},
                {"allocation": {"0": 0.5}},
                {"pattern": "2:4", "pattern_remainder": "dense"},
                {"pattern": "1:3", "pattern_remainder": "dense"},
                {"pattern": "17:20", "pattern_remainder": "error"},
            ]
        )
    )
    if "pattern" in options:
        asked: Any = None
    else:
        asked = draw(st.one_of(sparsities(), st.lists(sparsities(), min_size=1, max_size=12)))
    return Case(
        mesh, tensors, placements, {**options, "sparsity": asked, "nan": draw(st.sampled_from(["raise", "prune"]))}
    )


def whole_tensors(case: Case) -> dict[str, torch.Tensor]:
    return {
        str(number): from_patterns(np.random.default_rng(seed).choice(palette, size=shape), dtype).reshape(shape)
        for number, (shape, palette, dtype, seed) in enumerate(case.tensors)
    }


def spread(case: Case, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", case.mesh, mesh_dim_names=("dp", "tp")[-len(case.mesh) :])
    parts = {}
    for (name, tensor), dims in zip(tensors.items(), case.placements, strict=True):
        placements = [Replicate() if dim is None else Shard(dim) for dim in dims]
        over = mesh if len(dims) == len(case.mesh) else mesh["tp"]
        parts[name] = distribute_tensor(tensor, over, placements, src_data_rank=None)
    return parts


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
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_masks_of_parts_are_those_of_the_whole(ranks, case):
    ranks(int(np.prod(case.mesh))).run(compare, case)
