"""Rounds of training, pruning and rewinding of models that lie in parts on the ranks (FSDP2)."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_sharded_runs import network, whole_digest
from test_training_ranks import Breaking, _without_losses
from torch import nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh
from torch.utils.data import DataLoader

from lottery_tickets import Mask, compute_ticket_overlap
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError, RunFolderError, TrainingError, WeightsError
from lottery_tickets.masks import local_of, reshard
from lottery_tickets.training import SharedBatches
from ranks import GoneError
from test_early_bird import blobs, loader, one_thread  # noqa: F401
from test_iterative_pruning import prune, told

ADAM = partial(torch.optim.Adam, lr=0.003)


def squares(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of this rank's part; a pass afterwards leaves the model whole."""
    scores = {name: one.detach().square() for name, one in model.named_parameters()}
    with torch.no_grad():
        model(torch.zeros(1, 16))
    return scores


def squares_of_wholes(model: nn.Module) -> dict[str, torch.Tensor]:
    """Of the model as a pass leaves it."""
    with torch.no_grad():
        model(torch.zeros(1, 16))
    return {name: one.detach().square() for name, one in model.named_parameters()}


def train_by_hand(model: nn.Module, data: Any, epochs: int) -> float:
    """Plain torch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for inputs, labels in data:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), labels)
            loss.backward()
            optimizer.step()
    return float(loss.detach())


# Every rank sees all samples, as many ranks as a power of two: gradients are those of one process, bit for bit.
CASES: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "momentum": (2, torch.float32, {"optimizer": "sgd", "momentum": 0.9, "rewind_step": 3}),
    "layers": (4, torch.float32, {"scope": "layer", "layer_fractions": {"4.weight": 0.1}, "rewind_epoch": 1}),
    "function": (2, torch.float32, {"optimizer": ADAM, "criterion": squares, "rewind": "learning_rate"}),
    "wholes": (2, torch.float32, {"optimizer": "sgd", "criterion": squares_of_wholes, "rewind": "none"}),
    "halves": (2, torch.bfloat16, {"optimizer": "sgd", "momentum": 0.9, "rewind_step": 3}),
    "by hand": (2, torch.float32, {"trainer_fn": train_by_hand, "optimizer": "sgd"}),
}


def pruned(rank: int, dtype: torch.dtype, options: dict[str, Any], folder: Path | None) -> Any:
    model = network(rank >= 0, dtype, only_the_root="criterion" in options)
    evaluated = {"eval_dataloader": loader(), "test_dataloader": loader(shuffle=False)}
    results = prune(model, loader(), num_iterations=2, run_dir=folder, **evaluated, **options)
    assert isinstance(results["final_mask"], Mask)
    weights = whole_digest(model)
    reshard(model)
    for name, one in model.named_parameters():
        if name in results["final_mask"] and rank >= 0:
            assert not one.full_tensor()[~results["final_mask"][name]].any()
    rewound = results["rewind_state"]
    if folder is None and rank >= 0:
        assert all(isinstance(one, DTensor) for one in rewound.values()), "no more than this rank's part"
    return told(results), weights


QUICK = (("momentum", True), ("function", False), ("halves", False), ("by hand", False))


@pytest.mark.parametrize(
    ("case", "on_disk"),
    [
        pytest.param(case, on_disk, marks=() if (case, on_disk) in QUICK else pytest.mark.slow)
        for case in CASES
        for on_disk in (False, True)
    ],
)
def test_rounds_of_a_model_in_parts_are_those_of_the_whole(ranks, tmp_path, case, on_disk):
    size, dtype, options = CASES[case]
    alone = pruned(-1, dtype, options, tmp_path / "alone" if on_disk else None)
    found = ranks(size).run(pruned, dtype, options, tmp_path / "run" if on_disk else None)
    assert found == [alone] * size
    for file in ("rewind/model.safetensors", "masks/round-01.safetensors", "masks/round-02.safetensors"):
        if on_disk:
            assert (tmp_path / "run" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()


# --- Optimizers that step something else in the place of a parameter ---


def rewound_to_averages(rank: int, how: str) -> Any:
    """Adam, whose averages at the rewinding point are not zero where weights are pruned."""
    model = network(rank >= 0, torch.bfloat16 if how == "halves" else torch.float32, only_the_root=how == "root")
    seen = []

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        seen.append(optimizer)
        return torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)

    options = {"optimizer": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "rewind_step": 3}
    data = {"eval_dataloader": loader(), "test_dataloader": loader()}
    results = prune(model, loader(), num_iterations=2, scheduler=schedule, **data, **options)
    reshard(model)
    for name, one in model.named_parameters():
        if name in results["final_mask"]:
            gone = local_of(one) == 0
            index = list(dict(model.named_parameters())).index(name)
            state = seen[-1].state[seen[-1].param_groups[0]["params"][index]]
            assert gone.any()
            assert not state["exp_avg"][gone].any()
            assert not state["exp_avg_sq"][gone].any()
    weights = {name: one.full_tensor() if rank >= 0 else one for name, one in model.named_parameters()}
    return results, {name: one.detach() for name, one in weights.items()}


@pytest.mark.parametrize("how", ["layers", "halves", pytest.param("root", marks=pytest.mark.slow)])
def test_what_is_pruned_stays_zero_and_so_do_averages_of_it(ranks, how):
    alone, weights = rewound_to_averages(-1, how)
    (first, found), (second, _) = ranks(2).run(rewound_to_averages, how)
    assert told(first) == told(second)
    # Torch's fused steps round the last elements of a tensor otherwise than the others.
    for name, one in weights.items():
        torch.testing.assert_close(found[name], one, atol=1e-2 if how == "halves" else 1e-5, rtol=1e-3)
    assert compute_ticket_overlap(first["final_mask"], alone["final_mask"])["overall_overlap"] > 0.98
    assert first["final_mask"].kept == alone["final_mask"].kept
    for one, other in zip(
        [first["dense"], *first["iterations"]], [alone["dense"], *alone["iterations"]], strict=True
    ):
        assert one["eval_loss"] == pytest.approx(other["eval_loss"], rel=1e-2 if how == "halves" else 1e-4)


# --- Going on ---

CONTINUED = {"optimizer": "sgd", "momentum": 0.9, "num_iterations": 2, "rewind_epoch": 1, "save_every_steps": 3}


def broken_off(rank: int, in_parts: bool, folder: Path) -> None:
    """In the second epoch of the first round's training."""
    prune(network(in_parts), Breaking(rank, 2), run_dir=folder, process_group=dist.group.WORLD, **CONTINUED)


def gone_on(rank: int, in_parts: bool, folder: Path, seed: int = 5) -> Any:
    model = network(in_parts, seed=seed)  # the state brings the weights
    group = dist.group.WORLD if rank >= 0 else None
    results = prune(model, loader(), run_dir=folder, process_group=group, **CONTINUED)
    return _without_losses(told(results)), whole_digest(model)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param((2, True), (1, False), id="parts to a whole"),
        pytest.param((4, True), (2, True), id="4 to 2", marks=pytest.mark.slow),
        pytest.param((2, False), (4, True), id="wholes to parts", marks=pytest.mark.slow),
    ],
)
def test_rounds_go_on_with_the_same_bits_however_the_model_is_cut(ranks, tmp_path, before, after):
    expected = gone_on(-1, False, tmp_path / "other", seed=0)
    for answer in ranks(before[0]).attempt(broken_off, before[1], tmp_path / "run"):
        assert "the disk is gone" in str(answer)
    state = json.loads(next((tmp_path / "run").glob("state-*/state.json")).read_text())["values"]
    assert (state["round"], state["finished"]) == (1, False)
    assert ranks(after[0]).run(gone_on, after[1], tmp_path / "run") == [expected] * after[0]


def killed(rank: int, folder: Path) -> None:
    """Rank 1, as it gives its part of a state of the first round."""
    parts = count()

    def bring(ranks: Ranks, *arguments: Any) -> Iterator[torch.Tensor]:
        if rank == 1 and folder.joinpath("masks").exists() and next(parts) == 20:
            os.kill(os.getpid(), signal.SIGKILL)
        return bring_safely(ranks, *arguments)

    bring_safely, Ranks.bring = Ranks.bring, bring
    prune(network(True), loader(), run_dir=folder, **CONTINUED)


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_the_rounds_go_on(ranks, tmp_path):
    expected = gone_on(-1, False, tmp_path / "other", seed=0)
    with ranks.own(2) as own:
        first, second = own.attempt(killed, tmp_path / "run")
    assert isinstance(second, GoneError)
    assert isinstance(first, DistributedError)
    assert "rank 1" in str(first)
    assert len(list((tmp_path / "run").glob("state-*"))) == 1
    assert ranks(2).run(gone_on, True, tmp_path / "run") == [expected] * 2


# --- Shares of batches ---


def in_shares(rank: int) -> Any:
    group = dist.group.WORLD if rank >= 0 else None
    data = SharedBatches(DataLoader(blobs(49), 16, shuffle=True), group)  # 16, 16, 16 and 1
    evaluated = {"eval_dataloader": SharedBatches(DataLoader(blobs(17), 16), group)}
    model = network(rank >= 0, only_the_root=True)
    return prune(model, data, optimizer="sgd", momentum=0.9, process_group=group, eval_every_steps=3, **evaluated)


def test_ranks_train_and_measure_on_their_shares(ranks):
    alone, (first, second) = in_shares(-1), ranks(2).run(in_shares)
    assert told(first) == told(second)
    assert compute_ticket_overlap(first["final_mask"], alone["final_mask"])["overall_overlap"] > 0.98
    rounds = [[one["dense"], *one["iterations"]] for one in (first, alone)]
    for ours, expected in zip(*rounds, strict=True):
        assert ours["steps"] == expected["steps"] == 8
        assert [one["step"] for one in ours["evaluations"]] == [one["step"] for one in expected["evaluations"]]
        for one, other in zip(ours["evaluations"], expected["evaluations"], strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
            assert one["accuracy"] == other["accuracy"]


# --- What fails ---


def failing(rank: int, how: str, folder: Path) -> None:
    def criterion(model: nn.Module) -> dict[str, torch.Tensor]:
        if how == "another cut":
            mesh = init_device_mesh("cpu", (2,))
            wholes = {name: one.full_tensor() for name, one in squares(model).items()}
            return {name: distribute_tensor(one, mesh, [Shard(one.dim() - 1)]) for name, one in wholes.items()}
        scores = squares(model)
        if how == "nan" and rank == 1:
            local_of(scores["0.weight"])[0, 0] = torch.nan
        return scores

    def trainer_fn(model: nn.Module, data: Any, epochs: int) -> None:
        if rank == 1:
            raise KeyError("no such label")
        train_by_hand(model, data, epochs)

    options: dict[str, Any] = {"criterion": criterion, "optimizer": "sgd"}
    if how == "trainer":
        options["trainer_fn"] = trainer_fn
    if how == "no room":
        options["run_dir"] = folder
    with pytest.MonkeyPatch.context() as patch:
        if how == "no room":
            patch.setattr(Mask, "save", _no_room)
        try:
            prune(network(True), loader(), **options)
        except KeyError:
            os._exit(1)  # as a script ends that does not catch it


def _no_room(*_: Any, **__: Any) -> None:
    raise OSError("No space left on device")


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("another cut", TrainingError, "0.weight: one tensor is cut in one way and the other in another"),
        ("nan", WeightsError, "NaN"),
        (
            "no room",
            RunFolderError,
            "round-01.safetensors: the mask could not be written (No space left on device)",
        ),
    ],
)
def test_what_fails_on_one_rank_fails_on_all(ranks, tmp_path, how, kind, words):
    for answer in ranks(2).attempt(failing, how, tmp_path / "run"):
        assert type(answer) is kind
        assert words in str(answer)


@pytest.mark.slow
def test_a_training_function_that_fails_on_one_rank_ends_the_others(ranks, tmp_path):
    with ranks.own(2) as own:
        first, second = own.attempt(failing, "trainer", tmp_path)
    assert isinstance(first, DistributedError)
    assert "rank 1 failed: KeyError: 'no such label'" in str(first)
    assert isinstance(second, GoneError)
