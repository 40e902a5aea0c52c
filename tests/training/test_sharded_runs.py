"""Runs of models in parts (FSDP2): whole states on disk, written and read by ranks that hold a part of each tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_sharded_training import net
from test_training_ranks import Breaking, _without_losses
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lottery_tickets.training import digest_of, tensors_of
from test_early_bird import loader, one_thread, search, told  # noqa: F401

ADAM = partial(torch.optim.Adam, lr=0.003)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    "function": {"optimizer": ADAM, "learning_rate": None},
}
# Every rank sees all samples, as many ranks as a power of two: gradients are those of one process, bit for bit.
PLAIN = {"target_sparsity": 0.6, "max_epochs": 3, "check_every_steps": 3, "stability_window": 9}
PLAIN["max_grad_norm"] = None


def network(in_parts: bool, dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    """With rows that two and four ranks cannot share evenly."""
    model = net().to(dtype)
    if seed:
        torch.manual_seed(seed)
        for one in model.parameters():
            nn.init.normal_(one)
    if in_parts:
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(model)
    return model


def whole_digest(model: nn.Module) -> str:
    tensors = tensors_of(model)
    return digest_of(
        {name: one.full_tensor() if isinstance(one, DTensor) else one for name, one in tensors.items()}
    )


def broken_off(rank: int, folder: Path, in_parts: bool, dtype: torch.dtype, options: dict[str, Any]) -> None:
    group = dist.group.WORLD if rank >= 0 else None
    search(network(in_parts, dtype), Breaking(rank, 2), run_dir=folder, process_group=group, **options)


def gone_on(rank: int, folder: Path, in_parts: bool, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    model = network(in_parts, dtype, seed=5)  # the state brings the weights
    group = dist.group.WORLD if rank >= 0 else None
    results = search(model, loader(), run_dir=folder, process_group=group, **options)
    return _without_losses(told(results)), whole_digest(model)


def undisturbed(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    return gone_on(-1, folder, False, dtype, options)[0], None


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("before", "after", "name", "dtype"),
    [
        pytest.param((4, True), (2, True), "momentum", torch.float32, id="4 to 2"),
        pytest.param((2, True), (1, True), "function", torch.float32, id="2 to 1"),
        pytest.param((2, True), (2, False), "momentum", torch.bfloat16, id="parts to wholes, halves"),
        pytest.param((2, True), (4, True), "function", torch.float32, id="2 to 4", marks=SLOW),
        pytest.param((2, False), (4, True), "momentum", torch.float32, id="wholes to parts", marks=SLOW),
        pytest.param((4, True), (2, True), "momentum", torch.bfloat16, id="halves", marks=SLOW),
    ],
)
def test_a_run_goes_on_with_the_same_bits_however_the_model_is_cut(ranks, tmp_path, before, after, name, dtype):
    options = {**PLAIN, **OPTIMIZERS[name]}
    model = network(False, dtype)
    results = search(model, loader(), run_dir=tmp_path / "other", **options)
    expected = _without_losses(told(results)), whole_digest(model)
    (size, in_parts), folder = before, tmp_path / "run"
    for answer in ranks(size).attempt(broken_off, folder, in_parts, dtype, options):
        assert "the disk is gone" in str(answer)
    (state,) = folder.glob("state-*")
    assert int(state.name.removeprefix("state-")) > 1
    size, in_parts = after
    assert ranks(size).run(gone_on, folder, in_parts, dtype, options) == [expected] * size
    for group in ("model", "others"):
        (ours,), (theirs,) = (path.glob(f"state-*/{group}.safetensors") for path in (folder, tmp_path / "other"))
        if group == "model" or size == 1:
            assert ours.read_bytes() == theirs.read_bytes(), "the file that one process writes"
        assert load_file(ours).keys() == load_file(theirs).keys()
