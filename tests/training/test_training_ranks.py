"""Training on several ranks: the same bits on each, and those of one process that sees what they all see."""

from __future__ import annotations

import gc
import os
import signal
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lottery_tickets import compute_lottery_ticket_quality, create_magnitude_mask
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import BatchError, DistributedError, NonfiniteLossError, RunFolderError, TrainingError
from lottery_tickets.runs import _folder
from lottery_tickets.training import SharedBatches, Trainer, digest_of, make_optimizer, tensors_of
from oracles import bytes_of
from ranks import GoneError
from test_early_bird import blobs, loader, mlp, one_thread, search  # noqa: F401
from test_early_bird import told as told_of_search
from test_iterative_pruning import batchnorm_net, prune
from test_iterative_pruning import told as told_of_pruning

MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 1e-3},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.01},
    "function": {"optimizer": MOMENTUM, "learning_rate": None},
}


def plain(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Without dropout, which draws for as many samples as it sees."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def world() -> dist.ProcessGroup:
    return dist.group.WORLD


# --- Every rank has the same batches: the same bits as one process ---


def searched_alike(rank: int, options: dict[str, Any], folder: Path | None = None) -> Any:
    model = mlp()
    results = search(model, run_dir=folder, process_group=world(), **options)
    return told_of_search(results), digest_of(tensors_of(model))


@pytest.mark.parametrize(("size", "optimizer"), [*((2, name) for name in OPTIMIZERS), (4, "sgd")])
def test_ranks_with_the_same_batches_find_the_bits_that_one_process_finds(ranks, size, optimizer):
    options = {**OPTIMIZERS[optimizer], "target_sparsity": [0.5, 0.8], "max_epochs": 3, "stability_window": 2}
    model = mlp()
    alone = told_of_search(search(model, **options)), digest_of(tensors_of(model))
    assert ranks(size).run(searched_alike, options) == [alone] * size


def pruned_alike(rank: int, folder: Path | None, options: dict[str, Any]) -> Any:
    model = mlp()
    evaluated = {"eval_dataloader": loader(), "test_dataloader": loader(shuffle=False)}
    results = prune(model, run_dir=folder, process_group=world(), **evaluated, **options)
    return told_of_pruning(results), digest_of(tensors_of(model))


def test_rounds_of_ranks_with_the_same_batches_are_those_of_one_process(ranks, tmp_path):
    options = {"num_iterations": 2, "rewind_step": 3}
    model = mlp()
    alone = prune(model, eval_dataloader=loader(), test_dataloader=loader(shuffle=False), **options)
    expected = told_of_pruning(alone), digest_of(tensors_of(model))
    assert ranks(2).run(pruned_alike, None, options) == [expected] * 2
    assert ranks(2).run(pruned_alike, tmp_path / "run", options) == [expected] * 2
    assert len(list((tmp_path / "run" / "masks").glob("round-*.safetensors"))) == 2


# --- Every rank has a share of each batch ---


def uneven() -> DataLoader:
    """Batches of 16, 16, 16 and 1."""
    return DataLoader(blobs(49), 16, shuffle=True)


def searched_in_shares(rank: int, make: str, options: dict[str, Any]) -> Any:
    model = NETWORKS[make]()
    group = world()
    results = search(model, SharedBatches(uneven(), group), process_group=group, **options)
    return told_of_search(results), {name: one.clone() for name, one in tensors_of(model).items()}


NETWORKS = {"plain": plain, "wide": lambda: plain(dtype=torch.float64)}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sgd", "max_batch_size": 5},
        {"optimizer": "adamw", "learning_rate": 0.001, "max_grad_norm": 0.01},
        {"optimizer": MOMENTUM, "learning_rate": None, "max_grad_norm": 0.5},
    ],
    ids=["sgd", "micro-batches", "adamw", "function"],
)
def test_shares_of_a_batch_move_the_weights_as_the_whole_batch_does(ranks, size, options):
    options = {**options, "max_epochs": 2, "stability_window": 9}
    model = plain()
    alone = told_of_search(search(model, uneven(), **options))
    (first, weights), *others = ranks(size).run(searched_in_shares, "plain", options)
    assert all(other == first for other, _ in others)
    assert all(bytes_of(one[name]) == bytes_of(weights[name]) for _, one in others for name in weights)
    for name, one in tensors_of(model).items():
        torch.testing.assert_close(weights[name], one, atol=1e-6, rtol=1e-5)
    assert first["training"]["steps"] == alone["training"]["steps"] == 8
    assert first["training"]["mean_loss"] == pytest.approx(alone["training"]["mean_loss"], rel=1e-6)
    assert first["final_mask"] == create_magnitude_mask(_with(weights), 0.5).digest()


def _with(weights: dict[str, torch.Tensor]) -> nn.Module:
    model = plain()
    model.load_state_dict(weights)
    return model


def test_all_samples_are_shared_out_once():
    batches = [(torch.arange(count)[:, None], torch.arange(count)) for count in (7, 3, 1)]
    for size in (1, 2, 3, 5):
        parts = []
        for rank in range(size):
            shared = SharedBatches(batches)
            shared._rank, shared.processes = rank, size
            assert len(shared) == 3
            parts.append([labels.tolist() for _, labels in shared])
        found = [list(chain(*one)) for one in zip(*parts, strict=True)]
        assert found == [labels.tolist() for _, labels in batches]


# --- Graphs that differ from rank to rank ---


class Routed(nn.Module):
    """Two experts, of which a batch of class 0 uses the first, one of class 1 the second; a third never."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(3))
        self.head = nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        rows = [self.experts[int(one[0] > 0)](one) for one in inputs]
        return self.head(torch.stack(rows))


def routed_step(rank: int, kind: str, share: bool) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(4, 3, generator=generator)
    inputs[:, 0] = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    batch = (inputs, torch.tensor([0, 1, 0, 1]))
    if share:
        batch = tuple(one[2 * rank : 2 * rank + 2] for one in batch)
    model = Routed()
    optimizer = make_optimizer(
        MOMENTUM if kind == "function" else kind,
        model.named_parameters(),
        lr=0.1,
        weight_decay=0.0 if kind == "function" else 0.1,
        ranks=Ranks(world()) if share else None,
    )
    trainer = Trainer(model, optimizer, ranks=Ranks(world()) if share else None)
    for _ in range(2):
        trainer.step(batch)
    return {name: one.clone() for name, one in tensors_of(model).items()}


@pytest.mark.parametrize("kind", ["sgd", "adamw", "function"])
def test_parameters_that_some_ranks_do_not_use(ranks, kind):
    whole = routed_step(0, kind, False)
    for found in ranks(2).run(routed_step, kind, True):
        for name, one in whole.items():
            torch.testing.assert_close(found[name], one, atol=1e-6, rtol=1e-5)
        assert bytes_of(found["experts.2.weight"]) == bytes_of(Routed().experts[2].weight), "nobody used it"


def half_step(rank: int, clip: str | None) -> tuple[bytes, bytes]:
    """Weights of two bytes: gradients are added up in float32; clipped by the norm of all or of each."""
    model = plain(dtype=torch.bfloat16)
    group = Ranks(world())
    optimizer = make_optimizer(
        "sgd", model.named_parameters(), lr=0.5, max_grad_norm=0.01, clip=clip, seed=3, ranks=group
    )
    Trainer(model, optimizer, ranks=group).step(blobs()[:16])
    alone = plain(dtype=torch.bfloat16)
    optimizer = make_optimizer("sgd", alone.named_parameters(), lr=0.5, max_grad_norm=0.01, clip=clip, seed=3)
    Trainer(alone, optimizer).step(blobs()[:16])
    return tuple(b"".join(bytes_of(one) for one in tensors_of(each).values()) for each in (model, alone))


@pytest.mark.parametrize("clip", ["tensor", "global"])
def test_halves_on_ranks_are_rounded_as_on_one(ranks, clip):
    for together, alone in ranks(2).run(half_step, clip):
        assert together == alone


# --- Wrappers and loaders of others ---


def wrapped(rank: int) -> Any:
    model = nn.parallel.DistributedDataParallel(mlp())
    results = search(model, max_epochs=2)
    return told_of_search(results)


def test_a_model_in_distributed_data_parallel_brings_its_group(ranks):
    assert ranks(2).run(wrapped) == [told_of_search(search(max_epochs=2))] * 2


def left(rank: int, what: str) -> int:
    """How many objects refer to the group when a training is over, without the collector's help."""
    gc.collect()
    gc.disable()
    try:
        run = {"search": search, "prune": prune}[what]
        results = run(plain(), process_group=world(), optimizer="sgd")
        assert results["final_mask"].kept
        return sum(type(one) is Ranks for one in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["search", "prune"])
def test_nothing_refers_to_the_group_afterwards(ranks, what):
    assert ranks(2).run(left, what) == [0, 0]


def of_a_folder(rank: int, folder: Path) -> None:
    compute_lottery_ticket_quality(folder, {}, blobs()[:16], process_group=world())


def test_a_checkpoints_folder_is_for_one_process(ranks, tmp_path):
    for answer in ranks(2).attempt(of_a_folder, tmp_path):
        assert type(answer) is DistributedError
        assert f"Quality of a checkpoint's folder ({tmp_path}) is for one process" in str(answer)
        assert "leave process_group out, or load the model" in str(answer)


def with_sampler(rank: int, by: str) -> Any:
    if by == "accelerate":
        from accelerate.data_loader import prepare_data_loader

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = prepare_data_loader(
                loader(), num_processes=2, process_index=rank, split_batches=True, put_on_device=False
            )
    else:
        sampler = DistributedSampler(blobs(), num_replicas=2, rank=rank, shuffle=True)
        data = DataLoader(blobs(), 8, sampler=sampler)
    seen: list[int] = []

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(labels))
        return nn.functional.cross_entropy(logits, labels)

    results = search(plain(), data, max_epochs=2, process_group=world(), loss_fn=loss_fn)
    return told_of_search(results), seen


@pytest.mark.parametrize("by", ["sampler", "accelerate"])
def test_loaders_that_give_each_rank_its_own(ranks, by):
    first, second = ranks(2).run(with_sampler, by)
    assert first == second
    assert first[1] == [8] * 8, "half of 16 samples, four times in each of two epochs"


def with_running_statistics(rank: int) -> tuple[list[bytes], list[bytes]]:
    model, group = batchnorm_net(), world()
    search(model, SharedBatches(loader(), group), max_epochs=1, process_group=group)
    return [bytes_of(one) for one in model.buffers()], [bytes_of(one) for one in model.parameters()]


def test_running_statistics_are_those_of_rank_0_everywhere(ranks):
    first, second = ranks(2).run(with_running_statistics)
    assert first == second
    assert first[0] != [bytes_of(one) for one in batchnorm_net().buffers()]


# --- Going on, on another number of ranks ---


class Breaking:
    """A loader that fails on one rank in the middle of an epoch."""

    def __init__(self, rank: int, epoch: int) -> None:
        self._data, self._here, self._left = loader(), rank == 1, epoch

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[Any]:
        self._left -= 1
        for number, batch in enumerate(self._data):
            if self._here and self._left < 0 and number == 2:
                raise OSError("the disk is gone")
            yield batch

    @property
    def sampler(self) -> Any:
        return self._data.sampler


def broken_off(rank: int, what: str, folder: Path, options: dict[str, Any]) -> None:
    run = {"search": search, "prune": prune}[what]
    run(mlp(rank // 9), Breaking(rank, 3), run_dir=folder, process_group=world(), **options)


def gone_on(rank: int, what: str, folder: Path, options: dict[str, Any]) -> Any:
    model = mlp(5)  # the state brings the weights
    run, tell = {"search": (search, told_of_search), "prune": (prune, told_of_pruning)}[what]
    results = tell(run(model, run_dir=folder, process_group=world(), **options))
    return results, digest_of(tensors_of(model))


def _without_losses(value: Any) -> Any:
    """Means of batches that were seen twice by two ranks and four times by four."""
    if isinstance(value, dict):
        return {key: _without_losses(one) for key, one in value.items() if key not in ("train_loss", "mean_loss")}
    return [_without_losses(one) for one in value] if isinstance(value, (list, tuple)) else value


CONTINUED = {
    "search": {"target_sparsity": 0.6, "max_epochs": 5, "stability_window": 9, "momentum": 0.9},
    "prune": {"num_iterations": 2, "rewind_epoch": 1, "save_every_steps": 3},
}


@pytest.mark.parametrize("what", CONTINUED)
@pytest.mark.parametrize(("before", "after"), [(2, 4), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_same_bits_on_another_number_of_ranks(ranks, tmp_path, what, before, after):
    options, model = CONTINUED[what], mlp()
    run, tell = {"search": (search, told_of_search), "prune": (prune, told_of_pruning)}[what]
    undisturbed = tell(run(model, run_dir=tmp_path / "other", **options)), digest_of(tensors_of(model))
    folder = tmp_path / "run"
    for answer in ranks(before).attempt(broken_off, what, folder, options):
        assert "the disk is gone" in str(answer)
    assert sorted(folder.glob("state-*"))
    found = ranks(after).run(gone_on, what, folder, options)
    assert [_without_losses(one) for one in found] == [_without_losses(undisturbed)] * after


# --- Failing together ---


class Unsized:
    """Batches that do not say how many they are."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def failing(rank: int, how: str, folder: Path) -> None:
    group, data, model, options = world(), [*loader()], mlp(), {"max_epochs": 2}
    if how == "batch" and rank == 1:
        data[2] = "nonsense"
    if how == "fewer":
        data = Unsized(data[: 4 - rank])
    if how == "lengths":
        data = data[: 4 - rank]
    if how == "weights" and rank == 1:
        model = mlp(1)
    if how == "arguments":
        options["learning_rate"] = 0.1 * (rank + 1)
    if how == "masks" and rank == 1:
        options["loss_fn"] = partial(_changing, model)
    if how == "argument" and rank == 1:
        options["max_epochs"] = 0
    if how == "nonfinite" and rank == 1:
        data[0][0][3] = torch.inf
    if how == "folder":
        options["run_dir"] = folder
    search(model, data, process_group=group, **options)


def _changing(model: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        model[0].weight[0, 0] += 10
    return nn.functional.cross_entropy(logits, labels)


FAILURES: dict[str, tuple[type[Exception], str]] = {
    "batch": (BatchError, "nonsense|str"),
    "fewer": (TrainingError, "Rank 1 has no more than 3 batches in epoch 1"),
    "weights": (DistributedError, "Ranks 0 and 1 begin with different weights"),
    "lengths": (DistributedError, "Ranks 0 and 1 were called with different batches"),
    "arguments": (DistributedError, "Ranks 0 and 1 were called with different learning_rate"),
    "argument": (TrainingError, "max_epochs"),
    "nonfinite": (NonfiniteLossError, "on rank 1"),
    "folder": (RunFolderError, "of another configuration"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_a_rank_that_fails_fails_all_with_the_same_error(ranks, tmp_path, how):
    kind, words = FAILURES[how]
    if how == "folder":
        search(run_dir=tmp_path, max_epochs=1)
    answers = ranks(2).attempt(failing, how, tmp_path)
    assert [type(answer) for answer in answers] == [kind, kind]
    for answer in answers:
        with pytest.raises(kind, match=words):
            raise answer
    assert ranks(2).run(searched_alike, {"max_epochs": 1}), "the group is as good as before"


def test_masks_that_differ_are_noticed_at_the_next_check(ranks, tmp_path):
    def words(answer: Exception) -> str:
        return str(answer)

    answers = ranks(2).attempt(failing, "masks", tmp_path)
    assert all("draw different masks" in words(one) or "different loss_fn" in words(one) for one in answers)


def skipping(rank: int) -> Any:
    data = [*loader(shuffle=False)]
    if rank == 1:
        data[1][0][3] = torch.inf
    model = mlp()
    results = search(model, data, max_epochs=1, nonfinite="skip", process_group=world())
    return results["training"]["steps"], results["training"]["skipped"], digest_of(tensors_of(model))


def test_a_batch_that_one_rank_cannot_use_is_left_out_by_all(ranks):
    first, second = ranks(2).run(skipping)
    assert first == second
    assert first[:2] == (3, 1)


# --- Killed ---


def killed(rank: int, what: str, folder: Path) -> None:
    """A run of which one rank is killed: rank 1 in its sixth step, or rank 0 as it writes its third state."""
    steps, writes = count(), count()

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if what == "step" and rank == 1 and next(steps) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(logits, labels)

    def write_tensors(tensors: dict[str, torch.Tensor], path: Path | None) -> None:
        if what == "save" and rank == 0 and next(writes) == 5:  # of two files a state, the second
            Path(path).write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        write_safely(tensors, path)

    write_safely, _folder.write_tensors = _folder.write_tensors, write_tensors
    search(mlp(), loader(), run_dir=folder, process_group=world(), loss_fn=named(loss_fn), **KILLED)


def named(loss_fn: Any) -> Any:
    """As a run's configuration tells functions apart."""
    loss_fn.__module__, loss_fn.__qualname__ = "torch.nn.functional", "cross_entropy"
    return loss_fn


KILLED = {"target_sparsity": 0.6, "max_epochs": 4, "check_every_steps": 2, "stability_window": 9}


def after_the_kill(rank: int, folder: Path) -> Any:
    model = mlp(7)
    results = search(
        *(model, loader()),
        run_dir=folder,
        process_group=world(),
        loss_fn=nn.functional.cross_entropy,
        **KILLED,
    )
    return _without_losses(told_of_search(results)), digest_of(tensors_of(model))


@pytest.mark.parametrize(("what", "victim"), [("step", 1), pytest.param("save", 0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_ends_the_others_and_leaves_the_folder_whole(ranks, tmp_path, what, victim):
    model = mlp()
    expected = search(model, loader(), loss_fn=nn.functional.cross_entropy, **KILLED)
    undisturbed = _without_losses(told_of_search(expected)), digest_of(tensors_of(model))
    with ranks.own(2) as own:
        answers = own.attempt(killed, what, tmp_path / "run")
    assert isinstance(answers[victim], GoneError)
    assert isinstance(answers[1 - victim], DistributedError)
    assert f"rank {victim}" in str(answers[1 - victim])
    (state,) = (tmp_path / "run").glob("state-*")
    assert int(state.name.removeprefix("state-")) > 0
    assert ranks(2).run(after_the_kill, tmp_path / "run") == [undisturbed] * 2
