"""Rounds of training, pruning and rewinding: those of a loop written out by hand, and the same after a kill."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import oracles
from lottery_tickets import Mask, compute_iterative_magnitude_pruning, create_magnitude_mask
from lottery_tickets.errors import (
    EvaluationError,
    NonfiniteLossError,
    ParameterSelectionError,
    RunFolderError,
    SparsityError,
    TrainingError,
    WeightsError,
)
from lottery_tickets.runs import _folder
from lottery_tickets.training import tensors_of
from test_early_bird import blobs, lines, loader, mlp, one_thread  # noqa: F401

ADAM = partial(torch.optim.Adam, lr=0.01)
MOMENTUM = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=1e-3)


def prune(model: nn.Module | None = None, data: Any = None, **options: Any) -> Any:
    plain = {"target_sparsity": 0.8, "num_iterations": 3, "epochs": 2, "optimizer": MOMENTUM, "progress": False}
    return compute_iterative_magnitude_pruning(
        mlp() if model is None else model, loader() if data is None else data, **{**plain, **options}
    )


def told(results: Any) -> Any:
    """Results without what no two runs share."""
    rounds = [
        {k: v for k, v in one.items() if k != "seconds"} for one in [results["dense"], *results["iterations"]]
    ]
    others = {k: v for k, v in results.items() if k not in ("dense", "iterations", "final_mask", "rewind_state")}
    return {**others, "rounds": rounds, "final_mask": results["final_mask"].digest()}


def bits_of(tensors: Any) -> dict[str, bytes]:
    return {name: oracles.bytes_of(tensor) for name, tensor in tensors.items()}


# --- A loop written out by hand ---


def batchnorm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))


def by_hand(
    model: nn.Module,
    batches: Sequence[Any],
    make_optimizer: Callable[..., torch.optim.Optimizer],
    make_schedule: Callable[..., Any],
    densities: Sequence[float],
    epochs: int,
    rewind: str,
    at: int,
) -> tuple[list[dict[str, torch.Tensor]], nn.Module]:
    """Iterative pruning as one would write it: multiply by the mask after every step, sort to prune."""
    weights = {name: one for name, one in model.named_parameters() if name in ("0.weight", "3.weight")}
    masks = {name: torch.ones_like(weight) for name, weight in weights.items()}
    drawn = []
    steps = [batch for _ in range(epochs) for batch in batches]
    kept: Any = None
    for density in densities:
        optimizer = make_optimizer(model.parameters())
        schedule = make_schedule(optimizer)
        if kept is None:
            start = 0
        else:
            start = at
            state = copy.deepcopy(kept)
            if rewind == "weights":
                model.load_state_dict(state["model"])
                optimizer.load_state_dict(state["optimizer"])
            for group, lr in zip(
                optimizer.param_groups, state["rates" if rewind != "none" else "last"], strict=True
            ):
                group["lr"] = lr
            if rewind == "none":
                schedule = None
            else:
                schedule.load_state_dict(state["schedule"])
            for name, weight in weights.items():
                weight.data[masks[name] == 0] = 0
        for number in range(start, len(steps) + 1):
            if number == at and kept is None:
                kept = copy.deepcopy(
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "rates": [group["lr"] for group in optimizer.param_groups],
                    }
                )
            if number == len(steps):
                break
            inputs, labels = steps[number]
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
            for name, weight in weights.items():
                weight.data[masks[name] == 0] = 0
        kept.setdefault("last", [group["lr"] for group in optimizer.param_groups])
        drawn.append({name: mask.bool().clone() for name, mask in masks.items()})
        if density is not densities[-1]:
            numel = sum(weight.numel() for weight in weights.values())
            after = densities[len(drawn)]
            order = sorted(
                (bool(masks[name].flatten()[position]), abs(value), turn, name, position)
                for turn, (name, weight) in enumerate(weights.items())
                for position, value in enumerate(weight.flatten().tolist())
            )
            for _, _, _, name, position in order[: round(numel * (1 - after))]:
                masks[name].view(-1)[position] = 0
    return drawn, model


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)


@pytest.mark.parametrize("optimizer", [MOMENTUM, ADAM], ids=["momentum", "adam"])
@pytest.mark.parametrize("at", [0, 3, 4])
@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "none"])
def test_it_is_the_loop_written_out_by_hand_bit_for_bit(optimizer: Any, at: int, rewind: str) -> None:
    batches = [tuple(batch) for batch in DataLoader(blobs(), 16)]
    model = batchnorm_net()
    options = {"optimizer": optimizer, "scheduler": halving, "loss_fn": F.cross_entropy}
    results = prune(model, batches, rewind=rewind, rewind_step=at, **options)
    densities = [1.0, 0.2 ** (1 / 3), 0.2 ** (2 / 3), 0.2]
    masks, trained = by_hand(batchnorm_net(), batches, optimizer, halving, densities, 2, rewind, at)
    assert bits_of(tensors_of(model)) == bits_of(trained.state_dict())
    for one, expected in zip(results["iterations"], masks[1:], strict=True):
        assert one["mask_digest"] == Mask.from_tensors(expected).digest()
    assert results["rewind_step"] == at


def test_an_epoch_is_its_steps():
    by_epoch, by_step = prune(rewind_epoch=1), prune(rewind_step=4)
    assert (by_epoch["rewind_epoch"], by_epoch["rewind_step"]) == (1, 4)
    assert told({**by_epoch, "rewind_epoch": 0}) == told(by_step)
    assert bits_of(by_epoch["rewind_state"]) == bits_of(by_step["rewind_state"])


# --- What comes back ---


def test_results_say_what_the_issue_lists():
    model, held_out = mlp(), DataLoader(blobs(32), 16)
    results = prune(model, eval_dataloader=held_out, test_dataloader=held_out, epochs=3)
    assert set(results) == {
        *("method", "rewind", "target_sparsity", "rewind_epoch", "rewind_step", "dense", "iterations"),
        *("final_mask", "rewind_state"),
    }
    assert results["method"] == "iterative_magnitude_pruning"
    assert (results["rewind"], results["rewind_epoch"], results["rewind_step"]) == ("weights", 0, 0)
    numel = 16 * 32 + 32 * 4
    assert results["target_sparsity"] == round(0.8 * numel) / numel
    mask = results["final_mask"]
    assert mask.numel - mask.kept == round(0.8 * numel)
    rounds = [results["dense"], *results["iterations"]]
    assert [one["round"] for one in rounds] == [0, 1, 2, 3]
    for number, one in enumerate(rounds):
        assert one["sparsity"] == pytest.approx(1 - 0.2 ** (number / 3), abs=1 / numel)
        assert one["steps"] == 12
        assert one["skipped"] == 0
        assert 0 < one["train_loss"] < 2
        assert set(one["layer_sparsities"]) == {"0.weight", "3.weight"}
        assert [found["step"] for found in one["evaluations"]] == [4, 8, 12]
        last = one["evaluations"][-1]
        assert (one["eval_loss"], one["accuracy"]) == (last["loss"], last["accuracy"])
        best = min(one["evaluations"], key=lambda found: found["loss"])
        assert (one["early_stopping_step"], one["early_stopping_loss"]) == (best["step"], best["loss"])
        assert one["early_stopping_accuracy"] == best["accuracy"]
        assert (one["test_loss"], one["test_accuracy"]) == (last["loss"], last["accuracy"]), "the same data"
        assert one["early_stopping_test_loss"] == best["loss"]
        assert one["seconds"] > 0
    assert rounds[0]["mask_digest"] is None
    assert rounds[-1]["mask_digest"] == mask.digest()
    assert rounds[-1]["layer_sparsities"] == mask.layer_sparsity()
    assert all(not model.get_parameter(name)[~mask[name]].any() for name in mask)
    json.dumps({key: value for key, value in results.items() if key not in ("final_mask", "rewind_state")})


def test_without_data_to_evaluate_nothing_is_said_of_it():
    for one in prune()["iterations"]:
        assert one["evaluations"] == []
        assert one["eval_loss"] is one["accuracy"] is one["early_stopping_step"] is one["test_loss"] is None


def test_looking_changes_nothing():
    evaluated = prune(eval_dataloader=loader(), eval_every_steps=1)
    assert evaluated["final_mask"] == prune()["final_mask"]
    assert [one["step"] for one in evaluated["dense"]["evaluations"]] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_test_data_is_measured_at_the_least_evaluation_loss_and_at_the_end():
    results = prune(eval_dataloader=loader(), test_dataloader=loader(), eval_every_steps=1, epochs=4)
    for one in results["iterations"]:
        least = float("inf")
        for found in one["evaluations"]:
            new = found["loss"] < least
            least = min(least, found["loss"])
            assert (found["test_loss"] is not None) == (new or found is one["evaluations"][-1])


def test_masks_are_nested_and_the_rewound_state_is_the_saved_one(tmp_path):
    seen: list[dict[str, bytes]] = []
    model = batchnorm_net()

    def schedule(optimizer):  # made when everything has been put back
        seen.append(bits_of(tensors_of(model)))
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    results = prune(model, scheduler=schedule, rewind_step=2, run_dir=tmp_path, num_iterations=4)
    saved = load_file(results["rewind_state"])
    assert saved["1.num_batches_tracked"] == 2
    _, *rewound = seen
    assert rewound == [bits_of(saved)] * 4
    masks = [Mask.load(tmp_path / "masks" / f"round-{number:02d}.safetensors") for number in (1, 2, 3, 4)]
    assert [mask.digest() for mask in masks] == [one["mask_digest"] for one in results["iterations"]]
    for before, after in pairwise(masks):
        assert (before & after) == after
        assert before.kept > after.kept
    assert masks[-1].metadata["round"] == "4"


def test_a_round_draws_from_the_trained_weights():
    """One round of one-shot pruning is the mask of the trained network."""
    model, dense = mlp(), mlp()
    prune(dense, num_iterations=1, target_sparsity=0.01, rewind="none", epochs=1)
    trained = mlp()
    snapshots = []

    def train(network, data, epochs):
        snapshots.append(create_magnitude_mask(network, 0.5))
        with torch.no_grad():
            network[0].weight.add_(torch.randn(32, 16))
        snapshots.append(create_magnitude_mask(network, 0.5))

    results = prune(trained, trainer_fn=train, optimizer="sgd", num_iterations=1, target_sparsity=0.5)
    assert results["final_mask"] == snapshots[1]
    assert snapshots[0] == create_magnitude_mask(model, 0.5)


def test_scopes_and_fractions():
    by_layer = prune(scope="layer")
    assert by_layer["final_mask"].layer_sparsity() == {
        name: round(0.8 * numel) / numel for name, numel in (("0.weight", 512), ("3.weight", 128))
    }
    paper = prune(scope="layer", prune_fraction=0.2, layer_fractions={"3.*": 0.1})
    assert paper["iterations"][0]["layer_sparsities"] == {"0.weight": 102 / 512, "3.weight": 13 / 128}
    assert paper["target_sparsity"] == paper["final_mask"].sparsity
    excluded = prune(exclude="3.*")
    assert excluded["final_mask"].names == ("0.weight",)


def test_other_criteria():
    def smallest_last(model):
        return {name: 1 / (1e-3 + one.detach().abs()) for name, one in model.named_parameters() if one.dim() == 2}

    results = prune(criterion=smallest_last, num_iterations=2)
    assert results["method"] == "iterative_smallest_last_pruning"
    assert prune(criterion=partial(smallest_last), num_iterations=1)["method"] == results["method"]
    assert results["final_mask"] != prune(num_iterations=2)["final_mask"]


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_optimizers_by_name_hold_the_zeros(kind: str, dtype: torch.dtype) -> None:
    model = mlp(dtype=dtype)
    results = prune(model, optimizer=kind, learning_rate=0.01, rewind_step=2, num_iterations=2, weight_decay=0.1)
    mask = results["final_mask"]
    assert all(not model.get_parameter(name)[~mask[name]].any() for name in mask)
    assert model[0].weight.dtype == dtype


# --- A training loop of one's own ---


def test_a_trainer_of_ones_own_trains_inside_held():
    calls: list[tuple[int, int]] = []

    def train(model, data, epochs):
        zeros = int((model[0].weight == 0).sum())
        calls.append((epochs, zeros))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(epochs):
            for inputs, labels in data:
                loss = F.cross_entropy(model(inputs), labels)
                loss.backward()
                optimizer.step()
                if zeros:
                    assert int((model[0].weight == 0).sum()) == zeros
                    assert int((model[0].weight.grad == 0).sum()) >= zeros
                optimizer.zero_grad()
        return loss.item()

    results = prune(trainer_fn=train, optimizer="sgd", rewind_epoch=1, epochs=3, eval_dataloader=loader())
    assert [epochs for epochs, _ in calls] == [1, 2, 2, 2, 2]
    assert [zeros > 0 for _, zeros in calls] == [False, False, True, True, True]
    assert results["rewind_step"] is None
    for one in results["iterations"]:
        assert one["steps"] is one["early_stopping_step"] is None
        assert one["train_loss"] > 0
        assert one["accuracy"] > 0
    assert results["dense"]["evaluations"][0]["step"] == 3


def test_a_trainer_whose_loss_is_no_number():
    with pytest.raises(NonfiniteLossError, match="Epoch 2: trainer_fn returned nan"):
        prune(trainer_fn=lambda model, data, epochs: float("nan"), optimizer="sgd")


# --- What is left as it was ---


def test_the_same_call_gives_the_same_and_another_seed_another():
    first = told(prune())
    torch.manual_seed(99)
    random.seed(99)
    assert told(prune()) == first
    assert told(prune(seed=1)) != first


def test_random_states_modes_and_hooks_come_back():
    model = mlp().eval()
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    prune(model, eval_dataloader=loader())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not any(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(one._post_accumulate_grad_hooks for one in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"target_sparsity": 1.0}, SparsityError, "target_sparsity"),
        ({"target_sparsity": 0}, SparsityError, "target_sparsity is 0"),
        ({"num_iterations": 0}, TrainingError, "num_iterations"),
        ({"num_iterations": None}, TrainingError, "num_iterations"),
        ({"epochs": 1.5}, TrainingError, "epochs"),
        ({"rewind_epoch": 2}, TrainingError, "nothing would be left to train"),
        ({"rewind_epoch": -1}, TrainingError, "rewind_epoch"),
        ({"rewind_step": 8}, TrainingError, "training has 8 steps"),
        ({"rewind_step": 3, "rewind_epoch": 1}, TrainingError, "name two points"),
        ({"rewind": "weight"}, TrainingError, "'weights' or 'learning_rate' or 'none'; got 'weight'"),
        ({"scope": "row"}, TrainingError, "scope is 'global' or 'layer'"),
        ({"criterion": "fisher"}, TrainingError, "a function from the model to scores"),
        ({"prune_fraction": 0.0}, SparsityError, "prune_fraction is 0"),
        ({"prune_fraction": 1.2}, SparsityError, "prune_fraction"),
        ({"layer_fractions": {"7.*": 0.1}}, SparsityError, "matches none"),
        ({"layer_fractions": {"3.*": -0.1}}, SparsityError, "layer_fractions"),
        ({"eval_every_steps": 2}, TrainingError, "there is no eval_dataloader"),
        ({"test_dataloader": [1]}, TrainingError, "there is no eval_dataloader"),
        ({"save_every_steps": 0}, TrainingError, "save_every_steps"),
        ({"seed": -1}, TrainingError, "seed"),
        ({"include": "9.*"}, ParameterSelectionError, "matches no parameter"),
        ({"optimizer": "lion"}, TrainingError, "optimizer is one of"),
        ({"scheduler": lambda optimizer: 3}, TrainingError, "learning rate schedulers"),
        ({"trainer_fn": 3}, TrainingError, "trainer_fn"),
        ({"trainer_fn": print, "optimizer": "sgd", "rewind_step": 1}, TrainingError, "Use rewind_epoch"),
        ({"trainer_fn": print}, TrainingError, "optimizer would say how"),
    ],
)
def test_bad_input_changes_nothing(options: dict[str, Any], error: type[Exception], said: str) -> None:
    model = mlp()
    before = bits_of(tensors_of(model))
    with pytest.raises(error, match=said):
        prune(model, **options)
    assert bits_of(tensors_of(model)) == before


def test_a_prunable_weight_that_is_not_trained():
    model = mlp()
    model[0].weight.requires_grad_(False)
    with pytest.raises(TrainingError, match=r"0\.weight is prunable and requires no gradient"):
        prune(model)


def test_data_that_gives_nothing():
    with pytest.raises(TrainingError, match="no batches"):
        prune(data=[])
    with pytest.raises(EvaluationError, match="The evaluation data: There is nothing to measure: no batches came"):
        prune(eval_dataloader=[])


def test_a_step_that_is_never_reached():
    class Unsized:
        def __iter__(self) -> Iterator[Any]:
            return iter(DataLoader(blobs(), 16))

    with pytest.raises(TrainingError, match="rewind_step=9 was not reached: training had 8 steps"):
        prune(data=Unsized(), rewind_step=9)
    assert prune(data=Unsized(), rewind_step=7)["rewind_step"] == 7


def test_weights_that_became_nan():
    def train(model, data, epochs):
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")

    with pytest.raises(WeightsError, match=r"0\.weight"):
        prune(trainer_fn=train, optimizer="sgd")


# --- Run folders ---


class InterruptedRunError(Exception):
    pass


class FailingAt:
    """A loader that fails before a batch, once."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._loader = loader()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        for batch in self._loader:
            if self._left == 0:
                self._left = -1
                raise InterruptedRunError
            self._left -= 1
            yield batch


@pytest.mark.parametrize("rewind", ["weights", "learning_rate", "none"])
@pytest.mark.parametrize("at", [1, 6, 8, 11, 25])
@pytest.mark.parametrize("save_every_steps", [None, 1, 3])
def test_a_run_goes_on_where_it_was_left(
    tmp_path: Path, rewind: str, at: int, save_every_steps: int | None
) -> None:
    options = {
        "rewind": rewind,
        "rewind_step": 3,
        "scheduler": halving,
        "eval_dataloader": DataLoader(blobs(), 32),
        "save_every_steps": save_every_steps,
    }
    model = mlp()
    undisturbed = prune(model, run_dir=tmp_path / "undisturbed", **options)
    data = FailingAt(at)
    with pytest.raises(InterruptedRunError):
        prune(data=data, run_dir=tmp_path / "run", **options)
    other = mlp(seed=at > 2)  # where a state was saved, it brings the weights
    resumed = prune(other, data=data, run_dir=tmp_path / "run", **options)
    assert told(resumed) == told(undisturbed)
    assert bits_of(tensors_of(other)) == bits_of(tensors_of(model))
    assert without_seconds(tmp_path / "run") == without_seconds(tmp_path / "undisturbed")
    assert bits_of(load_file(resumed["rewind_state"])) == bits_of(load_file(undisturbed["rewind_state"]))


def without_seconds(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines(folder)]


def test_a_folder_changes_nothing(tmp_path):
    plain, model = mlp(), mlp()
    assert told(prune(model, run_dir=tmp_path)) == told(prune(plain))
    assert bits_of(tensors_of(model)) == bits_of(tensors_of(plain))


def test_a_run_that_is_over_is_read_and_not_trained(tmp_path):
    first = prune(run_dir=tmp_path)
    model = mlp(seed=3)

    def none(optimizer: Any) -> Any:
        raise AssertionError("nothing is to be trained")

    class Untouched(FailingAt):
        def __iter__(self) -> Iterator[Any]:
            raise AssertionError("nothing is to be trained")

    assert told(prune(model, Untouched(0), run_dir=tmp_path)) == told(first)
    assert int((model[0].weight == 0).sum()) > 0
    with pytest.raises(RunFolderError, match="holds a run already"):
        prune(run_dir=tmp_path, resume=False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_iterations": 4}, "num_iterations: 3 there, 4 now"),
        ({"optimizer": ADAM}, "optimizer: "),
        ({"optimizer": partial(MOMENTUM.func, lr=0.1)}, "optimizer: .*0.05.* there, .*0.1.* now"),
        ({"layer_fractions": {"3.*": 0.1}}, r"layer_fractions: \{\} there"),
    ],
)
def test_a_run_of_another_configuration_is_refused(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    prune(run_dir=tmp_path)
    with pytest.raises(RunFolderError, match=said):
        prune(run_dir=tmp_path, **options)


def test_a_disk_that_is_full_leaves_the_last_state(tmp_path, monkeypatch):
    undisturbed = prune(run_dir=tmp_path / "undisturbed")
    write, writes = _folder.write_tensors, []

    def full(*arguments: Any) -> None:
        writes.append(arguments)
        if len(writes) == 9:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(_folder, "write_tensors", full)
    with pytest.raises(RunFolderError, match="No space left on device"):
        prune(run_dir=tmp_path / "run")
    monkeypatch.undo()
    states = sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith("state-"))
    assert len(states) == 1
    assert not list((tmp_path / "run").glob(".*"))
    assert told(prune(run_dir=tmp_path / "run")) == told(undisturbed)


def test_a_disk_that_is_full_when_a_mask_is_written(tmp_path, monkeypatch):
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Mask, "save", full)
    with pytest.raises(RunFolderError, match=r"round-01\.safetensors: the mask could not be written"):
        prune(run_dir=tmp_path)
    monkeypatch.undo()
    assert told(prune(run_dir=tmp_path)) == told(prune())


@pytest.mark.parametrize("damage", ["missing", "other"])
def test_a_mask_that_is_not_the_runs_own_is_refused(tmp_path: Path, damage: str) -> None:
    with pytest.raises(InterruptedRunError):
        prune(data=FailingAt(15), run_dir=tmp_path, save_every_steps=1)
    path = tmp_path / "masks" / "round-01.safetensors"
    if damage == "missing":
        path.unlink()
    else:
        Mask.random_like(Mask.load(path), 0).save(path)
    with pytest.raises(RunFolderError, match=r"round-01\.safetensors is"):
        prune(data=FailingAt(-1), run_dir=tmp_path, save_every_steps=1)
