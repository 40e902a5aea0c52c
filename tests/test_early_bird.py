"""Early-bird tickets: found where there is one, not where nothing moves, and the same after a kill."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lottery_tickets
from lottery_tickets import Mask, create_magnitude_mask
from lottery_tickets.early_bird import compute_early_bird_tickets
from lottery_tickets.errors import NonfiniteLossError, RunFolderError, TrainingError
from processes import PEAK, run_python
from scoring import llama

TIMES = {"seconds", "check_seconds", "peak_bytes"}


def mlp(seed: int = 0, inputs: int = 16, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 4)).to(dtype)


def blobs(count: int = 64, inputs: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % 4
    centres = torch.randn(4, inputs, generator=generator)
    return TensorDataset(centres[labels] + 0.5 * torch.randn(count, inputs, generator=generator), labels)


def loader(**options: Any) -> DataLoader:
    return DataLoader(blobs(), **{"batch_size": 16, "shuffle": True, **options})


def search(model: nn.Module | None = None, data: Any = None, **options: Any) -> Any:
    options = {"learning_rate": 0.1, "max_epochs": 8, "progress": False, **options}
    return compute_early_bird_tickets(
        mlp() if model is None else model, loader() if data is None else data, **options
    )


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def told(results: Any) -> Any:
    """Results without what no two runs share."""
    if isinstance(results, list):
        return [told(one) for one in results]
    checkpoints = [{k: v for k, v in one.items() if k not in TIMES} for one in results["checkpoints"]]
    return {**results, "checkpoints": checkpoints, "final_mask": results["final_mask"].digest()}


# --- What comes back ---


def test_results_say_what_the_issue_lists():
    model = mlp()
    results = search(model, target_sparsity=0.7)
    assert set(results) == {
        *("converged", "convergence_epoch", "convergence_step", "final_mask", "checkpoints", "method"),
        *("target_sparsity", "training", "reason", "null_distance"),
    }
    assert results["converged"]
    assert results["method"] == "window"
    assert results["target_sparsity"] == 0.7
    assert isinstance(results["final_mask"], Mask)
    assert results["final_mask"] == create_magnitude_mask(model, 0.7), "drawn from the model as it came back"
    assert results["final_mask"].sparsity == pytest.approx(0.7, abs=1 / results["final_mask"].numel)
    assert results["training"]["steps"] == results["convergence_step"] == 4 * results["convergence_epoch"]
    assert results["training"]["skipped"] == 0
    assert results["training"]["mean_loss"] > 0
    checks = results["checkpoints"]
    assert [check["epoch"] for check in checks] == list(range(results["convergence_epoch"] + 1))
    assert [check["step"] for check in checks] == [4 * check["epoch"] for check in checks]
    first, *others = checks
    assert first["distances"] == []
    assert first["layer_distances"] == {}
    assert first["train_loss"] is first["moved_fraction"] is first["null_distance"] is None
    for check in others:
        assert 0 <= check["distances"][-1] < 1
        assert set(check["layer_distances"]) == {"0.weight", "3.weight"}
        assert check["moved_fraction"] > 0.9
        assert check["moved_error"] >= 0
        assert 0 < check["null_distance"] < 1
        assert check["null_error"] >= 0
        assert check["train_loss"] > 0
        assert check["rank_correlation"] is None
        assert check["check_seconds"] > 0
        assert check["peak_bytes"] > 1 << 20
    assert results["null_distance"] == checks[-1]["null_distance"]
    assert all(check["distances"][-1] < 0.1 for check in checks[-5:])
    json.dumps({key: value for key, value in results.items() if key != "final_mask"})


def test_distances_are_those_of_the_masks():
    """Against masks drawn in a loop of one's own, whose training is plain PyTorch."""
    masks: list[Mask] = []

    def train(model, data, epochs):
        masks.append(create_magnitude_mask(model, 0.5))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(epochs):
            for inputs, labels in data:
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), labels).backward()
                optimizer.step()

    model = mlp()
    results = search(model, trainer_fn=train, learning_rate=None, max_epochs=4)
    masks.append(create_magnitude_mask(model, 0.5))
    for index, check in enumerate(results["checkpoints"]):
        for back, distance in enumerate(reversed(check["distances"]), 1):
            one, other = masks[index], masks[index - back]
            differing = sum(int((one[name] != other[name]).sum()) for name in one)
            assert distance == differing / one.numel


def test_a_trainer_that_replaces_parameters_is_followed():
    def train(model, data, epochs):
        model[0].weight = nn.Parameter(model[0].weight.detach() + 0.1)

    model = mlp()
    results = search(model, trainer_fn=train, learning_rate=None, max_epochs=2)
    assert results["final_mask"] == create_magnitude_mask(model, 0.5)
    assert results["checkpoints"][-1]["moved_fraction"] == 512 / 640


@pytest.mark.parametrize("criterion", ["window", "queue", "rank_correlation"])
def test_every_criterion_ends(criterion):
    results = search(criterion=criterion, max_epochs=12)
    assert results["method"] == criterion
    assert results["converged"], results["reason"]
    if criterion == "rank_correlation":
        assert all(check["rank_correlation"] >= 0.95 for check in results["checkpoints"][-3:])
        assert told(search(use_magnitude_ranking=True, max_epochs=12)) == told(results)


def test_several_sparsities_are_several_searches():
    sparsities = [0.3, 0.9, 0.6]
    results = search(target_sparsity=sparsities, max_epochs=12, learning_rate=0.3)
    assert isinstance(results, list)
    epochs = [one["convergence_epoch"] for one in results]
    assert len(set(epochs)) > 1, "training goes on until the last has settled"
    for sparsity, one in zip(sparsities, results, strict=True):
        alone = search(target_sparsity=sparsity, max_epochs=12, learning_rate=0.3)
        assert one["training"]["steps"] == 4 * max(epochs)
        assert told({**alone, "training": None}) == told({**one, "training": None})
    assert told(search(target_sparsity=[0.6])) == [told(search(target_sparsity=0.6))]


def test_the_same_call_gives_the_same_and_another_seed_another():
    first = told(search())
    torch.manual_seed(99)
    random.seed(99)
    assert told(search()) == first
    assert told(search(seed=1)) != first


def test_random_states_modes_flags_and_hooks_come_back():
    model = mlp().eval()
    model[3].bias.requires_grad_(False)
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()]
    search(model, gradient_checkpointing=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert not any(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [(len(one._forward_hooks), len(one._forward_pre_hooks)) for one in model.modules()] == hooks
    assert not any(one._post_accumulate_grad_hooks for one in model.parameters())


# --- Steps, epochs, schedules ---


def test_checks_by_steps():
    results = search(check_every_steps=3, max_epochs=3, convergence_threshold=0.001)
    assert [(check["epoch"], check["step"]) for check in results["checkpoints"]] == [
        *((0, 0), (1, 3), (2, 6), (3, 9), (3, 12)),
    ]
    assert results["reason"]
    assert results["training"]["steps"] == 12


def test_checks_every_other_epoch():
    results = search(check_interval=2, max_epochs=5, convergence_threshold=0.001)
    assert [check["epoch"] for check in results["checkpoints"]] == [0, 2, 4]
    assert results["training"]["steps"] == 20, "all epochs are trained"


def test_data_that_is_not_a_loader():
    batches = [tuple(batch) for batch in DataLoader(blobs(), 16)]
    models = [mlp(), mlp()]
    for model in models:
        model[2].p = 0.0  # a loader draws from the stream that dropout draws from
    assert told(search(models[0], batches)) == told(search(models[1], loader(shuffle=False)))
    one = search(data=batches[0], max_epochs=2)
    assert one["training"]["steps"] == 2


def test_a_schedule_is_followed():
    seen = []

    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: seen.append(step) or 1.0)

    results = search(scheduler=schedule, max_epochs=2)
    assert seen == list(range(results["training"]["steps"] + 1))


@pytest.mark.parametrize("kind", ["sgd", "adamw", torch.optim.RMSprop, lambda p: torch.optim.Adam(p, lr=0.01)])
def test_optimizers(kind):
    options = {"learning_rate": 0.01 if isinstance(kind, str) else None}
    results = search(optimizer=kind, max_epochs=3, **options)
    losses = [check["train_loss"] for check in results["checkpoints"][1:]]
    assert losses[-1] < losses[0]
    if kind == "adamw":
        assert told(search(use_sgd=False, max_epochs=3, **options)) == told(results)


def test_max_batch_size_changes_nothing_that_matters():
    whole = search(mlp(), max_epochs=3)
    split = search(mlp(), max_epochs=3, max_batch_size=5)
    assert split["training"]["steps"] == whole["training"]["steps"]
    assert split["checkpoints"][1]["train_loss"] == pytest.approx(whole["checkpoints"][1]["train_loss"], rel=0.1)


def test_memory_is_told_before_and_overhead_afterwards(caplog):
    caplog.set_level("INFO", "lottery_tickets")
    search(max_epochs=1)
    messages = [record.getMessage() for record in caplog.records]
    (before,) = (place for place, text in enumerate(messages) if "Training will take about" in text)
    (after,) = (place for place, text in enumerate(messages) if "checks took" in text)
    assert before < after


# --- Not fooled ---


def test_a_learning_rate_of_zero_is_no_early_bird():
    results = search(learning_rate=0.0, max_epochs=10)
    assert not results["converged"]
    assert results["convergence_epoch"] is results["convergence_step"] is None
    assert "weights are not moving" in results["reason"]
    assert all(check["distances"][-1] == 0 for check in results["checkpoints"][1:])


def test_frozen_layers_are_no_early_bird():
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[3].weight.requires_grad_(False)
    results = search(model, max_epochs=10)
    assert not results["converged"]
    assert "weights are not moving" in results["reason"]
    assert results["checkpoints"][-1]["train_loss"] < results["checkpoints"][1]["train_loss"], "biases learn"


def test_a_frozen_model_is_no_early_bird():
    model = mlp().requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    results = search(model)
    assert not results["converged"]
    assert "weights are not moving: no parameter requires gradients" in results["reason"]
    assert results["final_mask"] == create_magnitude_mask(model, 0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_constant_trainer_is_no_early_bird():
    results = search(trainer_fn=lambda *_: None, learning_rate=None, max_epochs=10)
    assert not results["converged"]
    assert "weights are not moving" in results["reason"]
    assert results["training"] == {"steps": None, "skipped": 0, "mean_loss": None}


def test_steps_that_bfloat16_rounds_away_are_no_early_bird_and_stochastic_rounding_moves():
    still = search(mlp(dtype=torch.bfloat16), learning_rate=1e-6, precision="nearest", max_epochs=10)
    assert not still["converged"]
    assert "weights are not moving" in still["reason"]
    moving = search(mlp(dtype=torch.bfloat16), learning_rate=1e-4, precision="stochastic", max_epochs=3)
    assert moving["checkpoints"][1]["moved_fraction"] > still["checkpoints"][1]["moved_fraction"]


def test_a_model_trained_to_the_end_has_settled():
    model = mlp()
    search(model, max_epochs=30, convergence_threshold=1e-6)
    results = search(model, learning_rate=0.01, max_epochs=10)
    assert results["converged"]
    assert results["convergence_epoch"] == 5


def test_too_few_checks_are_told():
    results = search(max_epochs=3)
    assert not results["converged"]
    assert "4 checks" in results["reason"]
    assert "6" in results["reason"]


# --- Losses that are not finite ---


def poisoned(*places: int) -> list[Any]:
    batches = [[inputs.clone(), labels] for inputs, labels in DataLoader(blobs(), 16)]
    for place in places:
        batches[place][0][0] = math.inf
    return batches


def poison_later(epoch: int) -> Any:
    """A loader whose third batch is not finite from an epoch on."""

    class Loader:
        count = 0

        def __iter__(self):
            self.count += 1
            return iter(poisoned(2) if self.count > epoch else poisoned())

    return Loader()


def test_a_loss_that_is_not_finite_stops_with_the_last_mask():
    model = mlp()
    results = search(model, poison_later(2), max_epochs=10)
    assert not results["converged"]
    assert "Step 11: the loss is nan" in results["reason"]
    assert results["training"]["steps"] == 10
    assert [check["epoch"] for check in results["checkpoints"]] == [0, 1, 2]
    assert all(bool(tensor.isfinite().all()) for tensor in model.state_dict().values())
    again = mlp()
    two = search(again, poison_later(99), max_epochs=2)
    assert two["final_mask"] == results["final_mask"]


def test_left_out_batches_are_counted():
    results = search(mlp(), poisoned(2), nonfinite="skip", max_skipped=0.3, max_epochs=4)
    assert results["training"]["steps"] == 12
    assert results["training"]["skipped"] == 4
    stopped = search(mlp(), poisoned(2), nonfinite="skip", max_epochs=4)
    assert "max_skipped=0.01" in stopped["reason"]
    assert stopped["training"] == {**stopped["training"], "steps": 5, "skipped": 2}


def test_nothing_trained_is_an_error():
    with pytest.raises(NonfiniteLossError, match="Step 1: the loss is nan"):
        search(mlp(), poisoned(0))
    with pytest.raises(TrainingError, match="No batch was trained: all 4 were left out"):
        search(mlp(), poisoned(0, 1, 2, 3), nonfinite="skip", max_skipped=1.0, max_epochs=1)
    with pytest.raises(TrainingError, match="no batches in epoch 1"):
        search(mlp(), [])


# --- Real material ---


def test_a_net_on_real_digits(mnist):
    images, labels = mnist
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 5, stride=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 144, 10)),
    )
    data = DataLoader(TensorDataset(images[:1000], labels[:1000]), 100, shuffle=True)
    results = search(model, data, target_sparsity=[0.5, 0.9], max_epochs=12, learning_rate=0.05)
    assert all(one["converged"] for one in results)
    losses = [check["train_loss"] for check in results[0]["checkpoints"][1:]]
    assert losses[-1] < losses[0] / 2


def test_a_language_model_by_steps():
    model = llama()
    tokens = torch.randint(0, model.config.vocab_size, (24, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(4)]
    results = search(model, data, check_every_steps=2, learning_rate=0.01, max_epochs=3, momentum=0.9)
    assert len(results["checkpoints"]) >= 6
    assert set(results["final_mask"]) == set(lottery_tickets.prunable_parameters(model))


# --- Folders of runs ---


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "learning_rate": 0.01}, {"momentum": 0.9}])
def test_a_run_goes_on_from_any_check(tmp_path, options):
    options = {
        **{"check_every_steps": 3, "max_epochs": 5, "target_sparsity": [0.5, 0.9], "convergence_threshold": 0.03},
        **{"scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), **options},
    }
    model = mlp()
    expected = search(model, **options)
    assert told(expected) == told(search(run_dir=tmp_path / "whole", **options)), "a folder changes nothing"
    for stop in (0, 3):
        again = mlp(seed=stop)  # the state brings the weights
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            search(mlp(), InterruptedAfter(3 * stop + 1), run_dir=folder, **options)
        resumed = search(again, InterruptedAfter(1000), run_dir=folder, **options)
        assert told(resumed) == told(expected)
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
        assert lines(folder) == lines(tmp_path / "whole")


class InterruptedAfter(DataLoader):
    """Interrupted after so many batches of this process."""

    def __init__(self, count: int) -> None:
        super().__init__(blobs(), batch_size=16, shuffle=True)
        self.__dict__["left"] = count

    def __iter__(self):
        for batch in super().__iter__():
            if not self.left:
                raise KeyboardInterrupt
            self.__dict__["left"] -= 1
            yield batch


def lines(folder: Path) -> list[Any]:
    """What the run measured, without times."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def test_a_run_that_is_over_is_not_trained_again(tmp_path):
    first = search(run_dir=tmp_path)
    model = mlp(seed=9)
    again = search(model, InterruptedAfter(0), run_dir=tmp_path)
    assert told(again) == told(first)
    assert create_magnitude_mask(model, 0.5) == first["final_mask"]


def test_a_users_trainer_goes_on_from_any_check(tmp_path):
    def trainer(limit: int) -> Callable[..., float]:
        calls = []

        def train(model, data, epochs):
            calls.append(epochs)
            if len(calls) > limit:
                raise KeyboardInterrupt
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            for _ in range(epochs):
                for inputs, labels in data:
                    optimizer.zero_grad()
                    loss = F.cross_entropy(model(inputs), labels)
                    loss.backward()
                    optimizer.step()
            return loss.item()

        return train

    options = {"learning_rate": None, "max_epochs": 7, "check_interval": 2, "convergence_threshold": 1e-6}
    expected = search(trainer_fn=trainer(100), **options)
    assert [check["epoch"] for check in expected["checkpoints"]] == [0, 2, 4, 6]
    assert all(check["train_loss"] > 0 and check["step"] is None for check in expected["checkpoints"][1:])
    with pytest.raises(KeyboardInterrupt):
        search(trainer_fn=trainer(2), run_dir=tmp_path, **options)
    assert told(search(trainer_fn=trainer(100), run_dir=tmp_path, **options)) == told(expected)


def test_masks_of_all_checks_are_kept_if_asked(tmp_path):
    results = search(run_dir=tmp_path, save_masks=True, target_sparsity=[0.5, 0.25], max_epochs=3)
    files = sorted(path.name for path in (tmp_path / "masks").iterdir())
    assert files == [f"check-{check:04d}-{s}.safetensors" for check in range(4) for s in (0.25, 0.5)]
    last = Mask.load(tmp_path / "masks" / files[-1])
    assert last == results[0]["final_mask"]
    assert last.metadata["epoch"] == "3"
    assert last.metadata["target_sparsity"] == "0.5"


def test_another_configuration_is_refused(tmp_path):
    search(run_dir=tmp_path, max_epochs=2)
    with pytest.raises(RunFolderError, match=r"max_epochs: 2 there, 3 now; learning_rate: 0\.1 there, 0\.2"):
        search(run_dir=tmp_path, max_epochs=3, learning_rate=0.2)
    with pytest.raises(RunFolderError, match="model"):
        search(mlp(inputs=16)[3:], run_dir=tmp_path, max_epochs=2)
    with pytest.raises(RunFolderError, match="holds a run already"):
        search(run_dir=tmp_path, max_epochs=2, resume=False)


# --- Memory ---

MEASURED = (
    PEAK
    + """
import sys
import torch
from lottery_tickets.early_bird import compute_early_bird_tickets

def search(width, run_dir):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(width, width, bias=False) for _ in range(16)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(width, 2))
    batch = torch.randn(2, width), torch.tensor([0, 1])
    before = peak()
    compute_early_bird_tickets(model, [batch], max_epochs=2, run_dir=run_dir, progress=False)
    return peak() - before, sum(one.numel() * 4 for one in model.parameters())

torch.set_num_threads(1)
search(8, None)
print(*search(2048, None if sys.argv[1] == "no" else sys.argv[1]))
"""
)


@pytest.mark.slow
@pytest.mark.parametrize("saved", [False, True])
def test_a_search_takes_little_more_than_the_weights(tmp_path, saved):
    """No gradients, no copy of the weights, neither for a check nor for a state that is written."""
    above, weights = map(int, run_python(MEASURED, tmp_path if saved else "no").split())
    sample = 1 << 20
    masks, probe = 3 * weights // 32, 12 * 8 * sample
    assert above < 0.25 * weights + masks + probe
