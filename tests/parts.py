"""Tensors and models that lie in parts on the ranks of a test, in every way that there is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

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
                {"allocation": "lamp"},
                {"allocation": "owl", "owl_threshold": 1.5},
                {"allocation": "owl", "scope": "row", "owl_threshold": 1.25},
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


def mlp(dtype: torch.dtype = torch.float32, *, mixed: bool = False) -> nn.Sequential:
    """Layers whose rows no number of ranks divides, tied weights, and a layer with fewer rows than ranks."""
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 10),
        nn.ReLU(),
        nn.Linear(10, 6),
        nn.ReLU(),
        nn.Linear(6, 10),
        nn.ReLU(),
        nn.Linear(10, 1),
    ]
    model = nn.Sequential(*layers).to(dtype)
    model[4].weight = model[0].weight
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 16).round() / 16)  # many ties
    if mixed:
        model[2].bfloat16()
    return model


def shard(model: nn.Sequential, layout: str) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    if layout == "replicated":
        return model
    size = torch.distributed.get_world_size()
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        fully_shard(model[2], mesh=mesh)
        return fully_shard(model, mesh=mesh)
    shape = (size,) if layout == "tensor parallel" else (size // 2, 2)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[-len(shape) :])
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "4": ColwiseParallel(), "6": RowwiseParallel()}
    parallelize_module(model, mesh["tp"], plan)
    model[4].weight = model[0].weight
    return fully_shard(model, mesh=mesh["dp"]) if layout == "both" else model
