"""Early-bird tickets and quality of models that lie in parts on the ranks (FSDP2)."""

from __future__ import annotations

import os
import signal
from functools import partial
from itertools import count
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lottery_tickets import compute_lottery_ticket_quality, create_magnitude_mask
from lottery_tickets.errors import DistributedError, EvaluationError, TrainingError
from lottery_tickets.training import SharedBatches
from ranks import GoneError
from test_early_bird import blobs, one_thread, search, told  # noqa: F401
from test_iterative_pruning import prune

ADAM = partial(torch.optim.Adam, lr=0.003)


def net() -> nn.Sequential:
    """With rows that two and four ranks cannot share evenly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 13), nn.ReLU(), nn.Linear(13, 9), nn.ReLU(), nn.Linear(9, 4))


def in_parts() -> nn.Module:
    model = net()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def data() -> DataLoader:
    """Batches of 16, 16, 16 and 1."""
    return DataLoader(blobs(49), 16, shuffle=True)


def searched(rank: int, options: dict[str, Any]) -> Any:
    model = in_parts()
    results = search(model, SharedBatches(data(), dist.group.WORLD), **options)
    model.reshard()
    weights = {name: one.full_tensor().detach().clone() for name, one in model.named_parameters()}
    return told(results), weights


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {"optimizer": "sgd", "momentum": 0.9}),
        (4, {"optimizer": "sgd", "max_grad_norm": 0.05, "target_sparsity": [0.5, 0.8]}),
        (2, {"optimizer": "sgd", "max_batch_size": 3}),
        (2, {"optimizer": "adamw", "learning_rate": 0.003}),
        (2, {"optimizer": ADAM, "learning_rate": None, "max_grad_norm": 0.5}),
    ],
    ids=["momentum", "clipped", "micro-batches", "adamw", "function"],
)
def test_a_model_in_parts_is_trained_as_the_whole_one(ranks, size, options):
    options = {**options, "max_epochs": 2, "stability_window": 9}
    model = net()
    alone = told(search(model, data(), **options))
    (first, weights), *others = ranks(size).run(searched, options)
    assert all(other == first for other, _ in others)
    for name, one in model.named_parameters():
        torch.testing.assert_close(weights[name], one.detach(), atol=1e-5, rtol=1e-4)
    for ours, expected in zip(*(one if isinstance(one, list) else [one] for one in (first, alone)), strict=True):
        assert ours["training"]["steps"] == expected["training"]["steps"] == 8
        assert ours["training"]["mean_loss"] == pytest.approx(expected["training"]["mean_loss"], rel=1e-5)
        trained = net()
        trained.load_state_dict(weights)
        assert ours["final_mask"] == create_magnitude_mask(trained, expected["target_sparsity"]).digest()
        for one, other in zip(ours["checkpoints"], expected["checkpoints"], strict=True):
            assert one["moved_fraction"] == other["moved_fraction"]
            assert one["null_distance"] == pytest.approx(other["null_distance"], abs=0.02)


# --- Quality ---


def judged(rank: int, counts: list[int]) -> Any:
    model, batches = in_parts(), [*DataLoader(blobs(), 8)]
    mask = create_magnitude_mask(model, 0.5)
    start = sum(counts[:rank])
    own = batches[start : start + counts[rank]]
    return compute_lottery_ticket_quality(model, mask, own), compute_lottery_ticket_quality(
        model, mask.gathered(), own
    )


@pytest.mark.parametrize("counts", [[5, 3], [0, 8]])
def test_quality_of_a_model_in_parts_is_that_of_the_whole(ranks, counts):
    alone = compute_lottery_ticket_quality(net(), create_magnitude_mask(net(), 0.5), [*DataLoader(blobs(), 8)])
    for by_parts, by_whole in ranks(2).run(judged, counts):
        assert by_parts == by_whole
        assert by_parts["num_batches_evaluated"] == 8
        for name in ("loss", "accuracy", "performance_retention", "sparsity"):
            assert by_parts[name] == pytest.approx(alone[name], rel=1e-6)
        assert by_parts["retention_interval"] == pytest.approx(alone["retention_interval"], rel=1e-6)


# --- What is refused, and what fails ---


def failing(rank: int, how: str) -> None:
    model, batches = in_parts(), [*SharedBatches(data(), dist.group.WORLD)]
    if how == "blocks":
        search(model, batches, run_dir="run", optimizer="adamw8bit")
    if how == "criterion":
        search(model, batches, criterion="rank_correlation")
    if how == "rounds":
        prune(model, batches, run_dir=None, rewind_step=1, optimizer="adamw8bit")
    if how == "partly":
        partly = net()
        fully_shard(partly[0])
        search(partly, batches)
    if how == "no batches":
        compute_lottery_ticket_quality(model, create_magnitude_mask(model, 0.5), [])


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("blocks", TrainingError, "scales its states by blocks of a part's weights"),
        ("criterion", TrainingError, "ranks whole tensors"),
        ("rounds", TrainingError, "and rewind_step asks for states that any number of ranks can go on with"),
        ("partly", DistributedError, "2.weight is whole"),
        ("no batches", EvaluationError, "gave no batches"),
    ],
)
def test_what_cannot_be_done_in_parts_is_an_error_on_all_ranks(ranks, how, kind, words):
    for answer in ranks(2).attempt(failing, how):
        assert type(answer) is kind
        assert words in str(answer)


def killed(rank: int) -> None:
    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if rank == 1 and len(labels) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(logits, labels)

    search(in_parts(), SharedBatches(data(), dist.group.WORLD), loss_fn=loss_fn)


def stumbling(rank: int) -> None:
    calls = count()

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if rank == 1 and next(calls) == 2:
            raise KeyError("no such label")
        return nn.functional.cross_entropy(logits, labels)

    try:
        search(in_parts(), SharedBatches(data(), dist.group.WORLD), loss_fn=loss_fn)
    except KeyError:
        os._exit(1)  # as a script ends that does not catch it


@pytest.mark.slow
@pytest.mark.parametrize(("function", "words"), [(killed, "rank 1"), (stumbling, "rank 1 failed: KeyError")])
def test_a_rank_that_ends_in_the_middle_of_a_pass_ends_the_others(ranks, function, words):
    with ranks.own(2) as own:
        first, second = own.attempt(function)
    assert isinstance(first, DistributedError)
    assert words in str(first)
    assert isinstance(second, GoneError)
