"""Sharded models: masks drawn from them, applied, held, saved, and errors that end the work of all ranks."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lottery_tickets import (
    Mask,
    _ranks,
    applied,
    apply_mask,
    compute_ticket_overlap,
    create_magnitude_mask,
    held,
    remove_mask,
)
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError, MaskAppliedError, MaskError, MaskMismatchError, WeightsError
from lottery_tickets.masks import ShardedMask, local_of
from parts import mlp, shard
from ranks import GoneError


def digests(model: Any, **options: Any) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [mask.digest() for mask in create_magnitude_mask(model, [0.3, 0.5, 0.9], progress=False, **options)]


def digests_of_all(layout: str) -> list[list[str]]:
    single, half, mixed = (shard(mlp(**one), layout) for one in ({}, {"dtype": torch.bfloat16}, {"mixed": True}))
    found = [digests(model, scope=scope) for model in (single, half, mixed) for scope in ("global", "layer")]
    found.append([create_magnitude_mask(single, 0.5, scope="row", progress=False).digest()])
    found.append([create_magnitude_mask(mixed, None, pattern="2:4", pattern_remainder="dense").digest()])
    for model in (single, half, mixed):
        found += [digests(model, allocation="lamp"), digests(model, allocation="owl", owl_threshold=1.5)]
    return found


def draw(rank: int, layout: str) -> list[list[str]]:
    return digests_of_all(layout)


@pytest.fixture(scope="module")
def whole_digests() -> list[list[str]]:
    return digests_of_all("replicated")


@pytest.mark.parametrize(
    ("layout", "size"),
    [("fsdp", 1), ("fsdp", 2), ("fsdp", 4), ("tensor parallel", 2), ("both", 4), ("replicated", 2)],
)
def test_a_sharded_model_has_the_mask_of_the_whole_one(ranks, layout, size, whole_digests):
    assert ranks(size).run(draw, layout) == [whole_digests] * size


def overlaps(rank: int, layout: str) -> list[Any]:
    """Of two sharded masks, and of each with the other as a whole one."""
    model = shard(mlp(), layout)
    by_size, by_layer = (create_magnitude_mask(model, 0.5, scope=scope) for scope in ("global", "layer"))
    whole_size, whole_layer = by_size.gathered(), by_layer.gathered()
    pairs = [(by_size, by_layer), (by_size, whole_layer), (whole_size, by_layer)]
    return [compute_ticket_overlap(*pair, method="dice") for pair in pairs]


@pytest.mark.parametrize(("layout", "size"), [("fsdp", 2), ("both", 4)])
def test_sharded_masks_overlap_as_whole_ones(ranks, layout, size):
    whole = [create_magnitude_mask(mlp(), 0.5, scope=scope) for scope in ("global", "layer")]
    expected = compute_ticket_overlap(*whole, method="dice")
    assert 0 < expected["overall_overlap"] < 1
    assert ranks(size).run(overlaps, layout) == [[expected] * 3] * size


def other_cut(rank: int) -> Any:
    """A mask of rows beside one of columns, and masks of other layers."""
    rows, columns = (create_magnitude_mask(shard(mlp(), layout), 0.5) for layout in ("fsdp", "tensor parallel"))
    with pytest.raises(MaskMismatchError, match="sharded in another way"):
        compute_ticket_overlap(rows, columns)
    with pytest.raises(MaskMismatchError, match="no layer in common"):
        compute_ticket_overlap(rows, {"elsewhere": torch.ones(2, dtype=torch.bool)})


def test_masks_cut_in_different_ways_do_not_overlap(ranks):
    ranks(2).run(other_cut)


def whole_state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().clone()
        for name, tensor in model.state_dict().items()
    }


def loss_of(model: nn.Module) -> torch.Tensor:
    inputs = torch.arange(24.0).view(4, 6).sin()
    return model(inputs).square().sum()


def train(rank: int, layout: str, optimizer: str, whole: bool) -> dict[str, Any]:
    """What applying, holding and pruning do to a model, of which all is gathered in the end."""
    size = torch.distributed.get_world_size()
    model = shard(mlp(), layout)
    mask = create_magnitude_mask(model, 0.6, progress=False)
    if whole and isinstance(mask, ShardedMask):
        mask = mask.gathered()
    before = whole_state(model)
    done: dict[str, Any] = {"rank": rank, "size": size}
    with applied(model, mask):
        loss = loss_of(model)
        loss.backward()
        done["masked loss"] = loss.item()
        done["refused"] = _refusal(lambda: applied(model, mask).__enter__())
    done["gradients"] = gathered_gradients(model)
    model.zero_grad()
    done["dense loss"] = loss_of(model).item()
    done["back"] = all(torch.equal(tensor, before[name]) for name, tensor in whole_state(model).items())
    steps = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01, weight_decay=0.1)
    with held(model, mask):
        for _ in range(3):
            loss_of(model).backward()
            steps.step()
            steps.zero_grad()
    done["trained"] = whole_state(model)
    states = [value for state in steps.state.values() for value in state.values() if value.dim()]
    done["states"] = sum(float(local_of(value).abs().sum()) for value in states)
    removed = apply_mask(model, create_magnitude_mask(model, 0.8, progress=False), clone_weights=True)
    done["pruned"] = whole_state(model)
    remove_mask(model, create_magnitude_mask(model, 0.8, progress=False), removed)
    done["restored"] = all(
        torch.equal(tensor, done["trained"][name]) for name, tensor in whole_state(model).items()
    )
    return done


def gathered_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: getattr(one, "full_tensor", lambda one=one: one)().clone() for name, one in gradients.items()}


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except MaskAppliedError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("layout", "size", "optimizer", "whole"),
    [
        ("fsdp", 2, "SGD", False),
        ("fsdp", 4, "AdamW", True),
        ("tensor parallel", 2, "Adam", False),
        ("both", 4, "SGD", True),
    ],
)
def test_tickets_of_sharded_models_compute_and_train_as_those_of_whole_ones(ranks, layout, size, optimizer, whole):
    expected = ranks(1).run(train, "replicated", optimizer, True)[0]
    for found in ranks(size).run(train, layout, optimizer, whole):
        assert found["masked loss"] == pytest.approx(expected["masked loss"], rel=1e-5)
        assert found["dense loss"] == pytest.approx(expected["dense loss"], rel=1e-5)
        assert "already applied" in found["refused"]
        assert found["back"]
        assert found["restored"]
        for what in ("gradients", "trained", "pruned"):
            for name, tensor in expected[what].items():
                torch.testing.assert_close(found[what][name], tensor, rtol=1e-4, atol=1e-6)
                assert torch.equal(found[what][name] == 0, tensor == 0)


def save_and_load(rank: int, folder: str) -> tuple[str, bool, str]:
    path = Path(folder) / "ticket.safetensors"
    model = shard(mlp(), "fsdp")
    mask = create_magnitude_mask(model, 0.5, progress=False)
    assert isinstance(mask, ShardedMask)
    mask.save(path, metadata={"seed": "0"})
    loaded = Mask.load(path)
    again = ShardedMask.of(loaded, model)
    return mask.digest(), all(torch.equal(again[name], mask[name]) for name in mask), repr(again)


def test_the_file_is_that_of_the_whole_mask(ranks, tmp_path):
    expected = create_magnitude_mask(mlp(), 0.5, progress=False)
    expected.save(tmp_path / "whole.safetensors", metadata={"seed": "0"})
    found = ranks(4).run(save_and_load, str(tmp_path))
    assert [one[:2] for one in found] == [(expected.digest(), True)] * 4
    assert found[3][2] == "ShardedMask(3 tensors, 130 weights, 65 kept, sparsity 0.5000; 6 on this rank of 4)"
    assert (tmp_path / "ticket.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def save_nowhere(rank: int, folder: str) -> None:
    mask = create_magnitude_mask(shard(mlp(), "fsdp"), 0.5, progress=False)
    mask.save(Path(folder) / "missing" / "ticket.safetensors")


def test_a_file_that_rank_0_cannot_write_is_an_error_of_all(ranks, tmp_path):
    first, *others = ranks(2).attempt(save_nowhere, str(tmp_path))
    assert isinstance(first, FileNotFoundError)
    assert isinstance(others[0], DistributedError)
    assert str(others[0]).startswith("rank 0 failed: FileNotFoundError:")


def misuse(rank: int) -> list[str]:
    model = shard(mlp(), "fsdp")
    mask = create_magnitude_mask(model, 0.5, progress=False)
    other = shard(mlp(), "tensor parallel")
    told = []
    for call in (
        lambda: apply_mask(other, mask),
        lambda: mask & mask,
        lambda: Mask.ones_like(model) & mask,
        lambda: ShardedMask.of(mask.gathered(), mlp()),
        ShardedMask,
        lambda: create_magnitude_mask(model, 0.5, use_histogram=False),
        lambda: create_magnitude_mask(model, 0.5 + 0.1 * rank),
        lambda: create_magnitude_mask(model, 0.5, include="0.bias" if rank else None),
        lambda: create_magnitude_mask(model, 0.5, include="nowhere" if rank else None),
    ):
        try:
            call()
        except (MaskMismatchError, MaskError, TypeError, ValueError, DistributedError) as error:
            told.append(f"{type(error).__name__}: {error}")
    return told


def test_what_makes_no_sense_is_refused_by_all(ranks):
    found = ranks(2).run(misuse)
    assert found[0] == found[1]
    expected = (
        "MaskMismatchError: 2.weight: the mask was drawn from a model sharded in another way",
        "TypeError",
        "MaskError: This is a rank's part of a sharded mask",
        "MaskMismatchError: Sequential has no DTensor among the mask's parameters",
        "TypeError: Make a ShardedMask with",
        "SparsityError: use_histogram=False sorts all weights in one place",
        "DistributedError: The ranks are asked for different things: rank 0 for sparsity=0.5, scope global",
        "DistributedError: The ranks speak of different tensors: the first that differs is ",
        "ParameterSelectionError: include='nowhere' matches no parameter",
    )
    for told, start in zip(found[0], expected, strict=True):
        assert told.startswith(start)


def draw_from_flat_pieces(rank: int) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(mlp(), device_id=torch.device("cpu"), use_orig_params=True)
    create_magnitude_mask(model, 0.5)


def test_flat_pieces_of_the_older_fsdp_are_refused(ranks):
    for error in ranks(2).attempt(draw_from_flat_pieces):
        assert isinstance(error, WeightsError)
        assert "keeps flat pieces of weights under other names; shard it by torch.dist" in str(error)


def draw_from_nan(rank: int, value: float, options: dict[str, Any]) -> None:
    model = shard(mlp(), "fsdp")
    if rank == 1:
        local_of(model[2].weight)[0, 3] = value
        local_of(model[0].weight)[1, 1:3] = value
    create_magnitude_mask(model, None if "pattern" in options else 0.5, progress=False, **options)


@pytest.mark.parametrize("options", [{}, {"scope": "row"}, {"pattern": "1:2"}])
def test_nan_on_one_rank_is_named_by_all(ranks, options):
    found = ranks(4).attempt(draw_from_nan, float("nan"), options)
    for error in found:
        assert isinstance(error, WeightsError)
        assert "found in 0.weight (2), 2.weight (1). " in str(error)


def test_infinity_ranks_highest(ranks):
    assert ranks(4).run(draw_from_nan, float("inf"), {}) == [None] * 4


def be_killed(rank: int, folder: str, moment: tuple[str, int]) -> None:
    _ranks._ROLL_CALL_SECONDS = 1.0
    model, (call, number) = shard(mlp(), "fsdp"), moment
    calls, called = iter(range(100)), getattr(Ranks, call)

    def dying(self: Ranks, value: Any) -> Any:
        if rank == 2 and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return called(self, value)

    setattr(Ranks, call, dying)
    create_magnitude_mask(model, 0.5, progress=False).save(Path(folder) / "ticket.safetensors")


@pytest.mark.parametrize("moment", [("sum", 3), ("collect", 1)], ids=["counting", "saving"])
def test_a_rank_that_is_killed_is_named_by_the_others(ranks, tmp_path, moment):
    before = create_magnitude_mask(mlp(), 0.25)
    before.save(tmp_path / "ticket.safetensors")
    with ranks.own(3) as world:
        found = world.attempt(be_killed, str(tmp_path), moment)
    assert isinstance(found[2], GoneError)
    for survivor in (0, 1):
        assert isinstance(found[survivor], DistributedError)
        assert "no answer from rank 2," in str(found[survivor])
    assert Mask.load(tmp_path / "ticket.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["ticket.safetensors"]


def draw_smollm2(rank: int, folder: str) -> list[str]:
    from torch.distributed.fsdp import fully_shard
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    return [mask.digest() for mask in create_magnitude_mask(model, [0.5, 0.9], progress=False)]


@pytest.mark.slow
def test_smollm2_in_parts_has_the_mask_of_its_folder(ranks, smollm2_folder):
    expected = [mask.digest() for mask in create_magnitude_mask(smollm2_folder, [0.5, 0.9], progress=False)]
    for size in (1, 2, 4):
        with ranks.own(size) as world:
            assert world.run(draw_smollm2, str(smollm2_folder)) == [expected] * size


def draw_layerwise(rank: int, layout: str) -> list[Any]:
    from lottery_tickets import compute_layerwise_magnitude_ticket

    model, told = shard(mlp(), layout), []
    for by_rank in (True, False):
        for importance in (None, {"2": 3.0}):
            ticket = compute_layerwise_magnitude_ticket(model, 0.6, by_rank, importance, progress=False)
            told.append([ticket["masks"].digest(), {**ticket, "masks": None}])
    return told


def test_layerwise_tickets_of_sharded_models_are_those_of_whole_ones(ranks):
    expected = draw_layerwise(0, "replicated")
    assert ranks(4).run(draw_layerwise, "both") == [expected] * 4


def transposed() -> nn.Sequential:
    """Layers that store their inputs first, in groups and not."""
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(8, 6, 2, groups=2), nn.ConvTranspose1d(6, 5, 3), nn.Conv2d(10, 4, 1))


def draw_transposed(rank: int, dims: tuple[int, ...]) -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh, model = init_device_mesh("cpu", (4,) if len(dims) == 1 else (2, 2)), transposed()
    for layer in model:
        part = distribute_tensor(layer.weight.detach(), mesh, [Shard(dim) for dim in dims], src_data_rank=None)
        layer.weight = nn.Parameter(part)
    return digests_by_row_and_group(model)


def digests_by_row_and_group(model: nn.Module) -> list[str]:
    masks = create_magnitude_mask(model, [0.3, 0.7], scope="row", progress=False)
    masks.append(create_magnitude_mask(model, None, pattern="1:2", progress=False))
    return [mask.digest() for mask in masks]


@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (1, 0)])
def test_rows_and_groups_lie_where_the_layer_says(ranks, dims):
    assert ranks(4).run(draw_transposed, dims) == [digests_by_row_and_group(transposed())] * 4
