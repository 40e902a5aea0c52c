"""Runs of models in parts (FSDP2): whole states on disk, written and read by ranks with a part of each tensor."""

from __future__ import annotations

import json
import os
import signal
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from test_sharded_training import net
from test_training_ranks import Breaking, _without_losses, named
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh

from lottery_tickets._early_bird._search import Search
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError, TrainingError
from lottery_tickets.runs import RunFolder, State, _folder, decoded, encoded, write_tensors
from lottery_tickets.training import (
    Recipe,
    _parts,
    digest_of,
    part_of,
    restore_tensors,
    tensors_of,
    to_be_written,
    training,
)
from oracles import bytes_of
from ranks import GoneError
from test_early_bird import loader, one_thread, search, told  # noqa: F401

ADAM = partial(torch.optim.Adam, lr=0.003)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.01},
    "function": {"optimizer": ADAM, "learning_rate": None},
}
# Every rank sees all samples, as many ranks as a power of two: gradients are those of one process, bit for bit.
PLAIN = {"target_sparsity": 0.6, "max_epochs": 3, "check_every_steps": 3, "stability_window": 9}
PLAIN["max_grad_norm"] = None


def network(
    in_parts: bool, dtype: torch.dtype = torch.float32, seed: int = 0, only_the_root: bool = False
) -> nn.Module:
    """With rows that two and four ranks cannot share evenly."""
    model = net().to(dtype)
    if seed:
        torch.manual_seed(seed)
        for one in model.parameters():
            nn.init.normal_(one)
    if in_parts:
        for layer in model:
            if isinstance(layer, nn.Linear) and not only_the_root:
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


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("before", "after", "name", "dtype"),
    [
        pytest.param((4, True), (2, True), "momentum", torch.float32, id="4 to 2"),
        pytest.param((2, True), (1, True), "function", torch.float32, id="2 to 1", marks=SLOW),
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


# --- States there and back, whatever made them ---

STATES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "adamw": ({"optimizer": "adamw"}, torch.float32),
    "compensated adamw": ({"optimizer": "adamw", "precision": "compensated"}, torch.bfloat16),
    "compensated sgd": ({"optimizer": "sgd", "momentum": 0.9, "precision": "compensated"}, torch.bfloat16),
    "function": ({"optimizer": ADAM}, torch.float32),
}


def saved(rank: int, name: str, source: Path | None, target: Path) -> None:
    """Train and save, or read what another number of ranks saved and save that."""
    options, dtype = STATES[name]
    model, group = network(rank >= 0, dtype, seed=3), Ranks.world() if rank >= 0 else Ranks()
    with training(model):
        trainer = Recipe(**options).trainer(model, 0, ranks=group)
        if source is None:
            for batch in loader():
                trainer.step(batch)
        else:
            state = State(source / "state-00000000", {}, 0)
            values = json.loads((state.folder / "state.json").read_text())["values"]
            restore_tensors(model, state.tensors("model"))
            trainer.load(decoded(values["trainer"], state.tensors("others")))
        others: dict[str, torch.Tensor] = {}
        values = {"trainer": encoded(trainer.state(), others, "trainer")}
        with RunFolder.open(target, {}, ranks=group) as run:
            files = {"model": tensors_of(model), "others": others}
            run.save(values, {name: to_be_written(one, group) for name, one in files.items()})


@pytest.mark.parametrize("name", STATES)
def test_states_fit_any_number_of_ranks(ranks, tmp_path, name):
    by_two, by_four, by_one = (tmp_path / each for each in ("two", "four", "one"))
    ranks(2).run(saved, name, None, by_two)
    ranks(4).run(saved, name, by_two, by_four)
    saved(-1, name, by_four, by_one)
    files = sorted(path.relative_to(by_two) for path in by_two.glob("state-*/*"))
    assert len(files) == 3
    for file in files:
        first, *others = ((folder / file).read_bytes() for folder in (by_two, by_four, by_one))
        assert others == [first] * 2, file
    tensors = load_file(by_one / "state-00000000" / "others.safetensors")
    assert any(one.shape == (13, 16) and one.any() for one in tensors.values()), "of the whole"


def cut_and_put_together(rank: int, folder: Path) -> None:
    ranks, plain, square = Ranks.world(), init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    placements: list[tuple[Any, list[Any]]] = [
        *((plain, [one]) for one in (Shard(0), Shard(1), Replicate())),
        *((square, [one, other]) for one in (Shard(0), Replicate()) for other in (Shard(0), Shard(1))),
    ]
    for number, (mesh, placed) in enumerate(placements):
        there, wholes = {}, {}
        for shape in ((7, 5), (2, 3), (0, 4), (4, 3, 2), (1, 1)):
            for dtype in (torch.bfloat16, torch.float64, torch.bool):
                name = f"{shape} {dtype}"
                wholes[name] = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
                there[name] = distribute_tensor(wholes[name], mesh, placed, src_data_rank=None)
                assert bytes_of(part_of(name, wholes[name], there[name])) == bytes_of(there[name].to_local())
        path = folder / f"{number}.safetensors"
        write_tensors(to_be_written(there, ranks), path if ranks.first else None)
        if ranks.first:
            found = load_file(path)
            assert {name: bytes_of(one) for name, one in found.items()} == {
                name: bytes_of(one) for name, one in wholes.items()
            }


def test_tensors_however_they_are_cut_are_written_whole(ranks, tmp_path):
    ranks(4).run(cut_and_put_together, tmp_path)
    assert len(list(tmp_path.iterdir())) == 7


# --- Nobody has the model ---

WIDE, DEEP = 512, 16  # a megabyte a tensor, and three of them with the optimizer's


class Deep(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*(nn.Linear(WIDE, WIDE, bias=False) for _ in range(DEEP)), nn.Linear(WIDE, 4))
        for layer in self:
            fully_shard(layer)
        fully_shard(self)


def memory(what: str) -> int:
    with Path("/proc/self/status").open() as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(f"{what}:"))


def growth(block: Any) -> int:
    """Most bytes in memory during a call, above those before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    block()
    return memory("VmHWM") - before


def gauged(rank: int, folder: Path) -> dict[str, Any]:
    group = dist.group.WORLD
    together: list[int] = []
    last: list[Any] = []

    def whole(one: Any) -> torch.Tensor | None:
        found = put_together(one)
        if found is not None:
            assert all(other() is None for other in last), "the tensor before is still there"
            last[:] = [weakref.ref(found)]
            together.append(found.nbytes)
        return found

    found: dict[str, Any] = {"save": [], "load": []}

    def save(run: Any, *arguments: Any) -> None:
        found["save"].append(growth(lambda: save_plainly(run, *arguments)))

    def load(one: Any, run: Any) -> None:
        before = memory("RssAnon")
        load_plainly(one, run)
        found["load"].append(memory("RssAnon") - before)

    put_together, _parts._InParts.whole = _parts._InParts.whole, whole
    save_plainly, RunFolder.save = RunFolder.save, save
    load_plainly, Search._load = Search._load, load
    options = {"optimizer": "adamw", "max_grad_norm": None, "run_dir": folder, "stability_window": 9}
    batches = [(torch.randn(2, WIDE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1]))]
    try:
        with pytest.raises((KeyError, DistributedError), match="step"):
            search(Deep(), batches, max_epochs=2, scheduler=Stumbling, process_group=group, **options)
        search(Deep(), batches, max_epochs=2, scheduler=Stumbling, process_group=group, **options)
    finally:
        _parts._InParts.whole, RunFolder.save, Search._load = put_together, save_plainly, load_plainly
    return {**found, "together": together}


class Stumbling(torch.optim.lr_scheduler.LRScheduler):
    """Fails after the second step of a process."""

    steps = 0

    def get_lr(self) -> list[float]:
        return list(self.base_lrs)

    def step(self) -> None:
        type(self).steps += 1
        if type(self).steps == 3:
            raise KeyError("step")
        super().step()


def test_no_rank_ever_has_the_model(ranks, tmp_path):
    """By what is put together, one tensor at a time and on rank 0 alone, and by the memory of each process."""
    tensor, rank_0, *others = WIDE * WIDE * 4, *ranks(4).run(gauged, tmp_path)
    assert max(rank_0["together"]) == tensor
    assert rank_0["together"].count(tensor) >= 3 * DEEP, "weights and both averages of one state at least"
    assert [one["together"] for one in others] == [[]] * 3
    assert max(rank_0["save"]) < 4 * tensor, "the whole state takes 48 tensors"
    for one in others:
        assert max(one["save"]) < tensor
    for one in (rank_0, *others):
        assert max(one["load"]) < 12 * tensor, "a quarter of both averages takes 8, and the file is only mapped"


# --- What cannot be told of the whole ---


class ByRows(torch.optim.SGD):
    """Keeps a number for each row."""

    def step(self, closure: Any = None) -> None:
        for one in self.param_groups[0]["params"]:
            self.state[one]["rows"] = one.grad.to_local().sum(-1)
        super().step()


def failing(rank: int, folder: Path) -> None:
    search(network(True), loader(), optimizer=ByRows, run_dir=folder)


def test_states_of_another_shape_than_the_weights_are_an_error_on_all_ranks(ranks, tmp_path):
    for answer in ranks(2).attempt(failing, tmp_path):
        assert type(answer) is TrainingError
        assert "0.weight lies in parts on the ranks, and the optimizer's 'rows' of it is (" in str(answer)


# --- Killed ---


def killed(rank: int, what: str, folder: Path) -> None:
    """A run of which one rank is killed: in its sixth step, or in a save, as it writes or gives its part."""
    steps, writes, parts = count(), count(), count()

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if what == "step" and rank == 1 and next(steps) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(logits, labels)

    def write_tensors(tensors: Any, path: Path | None) -> None:
        if what == "write" and rank == 0 and next(writes) == 5:  # of two files a state, the second
            path.write_bytes(b"half of a file")
            os.kill(os.getpid(), signal.SIGKILL)
        write_safely(tensors, path)

    def bring(ranks: Ranks, *arguments: Any) -> Iterator[torch.Tensor]:
        if what == "part" and rank == 1 and next(parts) == 20:  # of twelve a state once there is momentum
            os.kill(os.getpid(), signal.SIGKILL)
        return bring_safely(ranks, *arguments)

    write_safely, _folder.write_tensors = _folder.write_tensors, write_tensors
    bring_safely, Ranks.bring = Ranks.bring, bring
    search(network(True), loader(), run_dir=folder, loss_fn=named(loss_fn), **KILLED)


KILLED = {**PLAIN, **OPTIMIZERS["momentum"], "max_epochs": 4, "check_every_steps": 2}


def after_the_kill(rank: int, folder: Path) -> Any:
    model = network(True, seed=7)
    results = search(model, loader(), run_dir=folder, loss_fn=nn.functional.cross_entropy, **KILLED)
    return _without_losses(told(results)), whole_digest(model)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "victim"), [("step", 1), ("write", 0), ("part", 1)])
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(ranks, tmp_path, what, victim):
    model = network(False)
    expected = search(model, loader(), loss_fn=nn.functional.cross_entropy, **KILLED)
    undisturbed = _without_losses(told(expected)), whole_digest(model)
    with ranks.own(2) as own:
        answers = own.attempt(killed, what, tmp_path / "run")
    assert isinstance(answers[victim], GoneError)
    assert isinstance(answers[1 - victim], DistributedError)
    assert f"rank {victim}" in str(answers[1 - victim])
    (state,) = (tmp_path / "run").glob("state-*")
    assert int(state.name.removeprefix("state-")) > 0
    assert ranks(2).run(after_the_kill, tmp_path / "run") == [undisturbed] * 2
