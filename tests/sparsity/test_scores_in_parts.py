"""Masks of scores that several ranks hold in parts: those of the scores in one piece, bit for bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lottery_tickets import ShardedMask, applied, create_importance_mask
from lottery_tickets.errors import LotteryTicketError
from lottery_tickets.masks import is_sharded, local_of
from lottery_tickets.sparsity import _blocks
from parts import Case, cases, mlp, shard, spread, whole_tensors


def drawn(scores: dict[str, torch.Tensor], options: dict[str, Any]) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            masks = create_importance_mask(scores, progress=False, check_memory=False, **options)
    except LotteryTicketError as error:
        return type(error).__name__, str(error)
    return masks if isinstance(masks, list) else [masks]


def compare(rank: int, case: Case, keep: str) -> None:
    scores = whole_tensors(case)
    options = {name: value for name, value in case.options.items() if name != "nan"} | {"keep": keep}
    expected = drawn(scores, options)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_blocks, "_SMALLEST_BLOCK", 64)
        patched.setattr(_blocks, "_SCRATCH_BYTES", 1)
        found = drawn(spread(case, scores), options)
    if isinstance(expected, tuple):
        assert found == expected
        return
    assert [one.digest() for one in found] == [one.digest() for one in expected]
    assert [one.layer_kept() for one in found] == [one.layer_kept() for one in expected]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), keep=st.sampled_from(["largest", "smallest"]))
def test_masks_of_scores_in_parts_are_those_of_the_whole(ranks, case, keep):
    ranks(int(np.prod(case.mesh))).run(compare, case, keep)


# --- Beside a model ---

OPTIONS: tuple[dict[str, Any], ...] = (
    {"sparsity": [0.3, 0.7]},
    {"sparsity": 0.5, "scope": "row"},
    {"sparsity": 0.6, "keep": "smallest", "scope": "layer"},
    {"sparsity": None, "pattern": "1:2"},
)


def scores_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Signed, and with many ties, for each parameter's whole shape."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: one.shape for name, one in model.named_parameters() if name.endswith("weight")}
    return {name: torch.randint(-4, 9, shape, generator=generator) / 4 for name, shape in shapes.items()}


def digests(scores: dict[str, torch.Tensor], model: nn.Module) -> list[str]:
    masks = [create_importance_mask(scores, model=model, progress=False, **options) for options in OPTIONS]
    return [one.digest() for mask in masks for one in (mask if isinstance(mask, list) else [mask])]


def part_of(whole: torch.Tensor, parameter: torch.Tensor) -> Any:
    """The scores as a DTensor that lies as the parameter does; whole ones of a whole parameter."""
    from torch.distributed.tensor import distribute_tensor

    if not is_sharded(parameter):
        return whole
    like: Any = parameter
    # Not by distribute_tensor on the parameter's own mesh: it does not know how FSDP cuts what TP has cut.
    plain = [one for one in like.placements if type(one).__name__ == "Shard" or one.is_replicate()]
    if len(plain) == len(like.placements):
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
    return None


def ranked_in_every_form(rank: int, layout: str) -> list[list[str]]:
    model = shard(mlp(), layout)
    parameters = dict(model.named_parameters())
    whole = scores_of(model)
    parts = {name: part_of(one, parameters[name]) for name, one in whole.items()}
    found = [digests(whole, model)]
    if all(one is not None for one in parts.values()):
        found.append(digests(parts, model))
        found.append(digests({name: local_of(one).clone() for name, one in parts.items()}, model))
    mask = create_importance_mask(whole, 0.5, model=model, progress=False)
    assert isinstance(mask, ShardedMask)
    with applied(model, mask):  # which it fits
        pass
    return found


@pytest.mark.parametrize(
    ("layout", "size", "forms"), [("fsdp", 2, 3), ("fsdp", 4, 3), ("tensor parallel", 2, 3), ("both", 4, 1)]
)
def test_scores_are_taken_in_parts_and_whole_beside_a_model_in_parts(ranks, layout, size, forms):
    expected = digests(scores_of(mlp()), mlp())
    assert ranks(size).run(ranked_in_every_form, layout) == [[expected] * forms] * size


def misuse(rank: int, how: str) -> None:
    from torch.distributed.tensor import Replicate, distribute_tensor

    model = shard(mlp(), "fsdp")
    scores = scores_of(model)
    options: dict[str, Any] = {"keep": "smallest"} if how == "keep" and rank else {}
    if how == "elsewhere":
        mesh = model[0].weight.device_mesh
        scores["2.weight"] = distribute_tensor(scores["2.weight"], mesh, [Replicate()], src_data_rank=None)
    if how == "nan" and rank:
        scores["2.weight"][1:3, 2] = float("nan")
        scores["0.weight"][9] = float("nan")
    if how == "shape" and rank:
        scores["2.weight"] = scores["2.weight"][:, :4]
    create_importance_mask(scores, 0.5, model=model, progress=False, **options)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "keep",
            "different things: rank 0 for keep='largest'; rank 1 for keep='smallest'",
        ),
        ("elsewhere", "2.weight: the scores are sharded in another way than the weights"),
        ("nan", "NaN has no rank among magnitudes; found in 0.weight (6)"),
        ("shape", "2.weight: scores (6, 4), parameter (6, 10)"),
    ],
)
def test_what_one_rank_cannot_rank_is_an_error_on_all(ranks, how, words):
    for answer in ranks(2).attempt(misuse, how):
        assert isinstance(answer, LotteryTicketError)
        assert words in str(answer)
