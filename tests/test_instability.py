"""Siblings from one trunk: against plain loops, on a landscape whose valleys are known, and after kills."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lottery_tickets
from lottery_tickets import (
    Mask,
    compute_instability,
    compute_iterative_magnitude_pruning,
    compute_linear_mode_connectivity,
    create_magnitude_mask,
)
from lottery_tickets._stability._results import summarised
from lottery_tickets.errors import (
    EvaluationError,
    MaskError,
    MaskMismatchError,
    RunFolderError,
    TrainingError,
)
from lottery_tickets.stability import SiblingPair, make_train_function
from lottery_tickets.training import DataOrder, tensors_of
from processes import PEAK, run_python

GENERATOR = torch.Generator().manual_seed(1)
INPUTS = torch.randn(40, 6, generator=GENERATOR)
LABELS = (INPUTS @ torch.randn(6, 3, generator=GENERATOR)).argmax(1)
STEPS = 5 * 4  # of a training with the defaults below


@pytest.fixture(autouse=True)
def one_thread():
    """The nets are too small for two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def net(seed: int) -> nn.Module:
    """Draws without seeding, as users' functions do."""
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def loader(batch_size: int = 8, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size, **{"shuffle": True, **options})


def training_of(**options: Any) -> Any:
    options = {"learning_rate": 0.1, "momentum": 0.9, "epochs": 4, **options}
    return make_train_function(options.pop("data", loader()), **options)


def analyse(train: Any = None, steps: Any = (0, 7), seeds: Any = (0, 1), **options: Any) -> Any:
    options = {"dataloader": (INPUTS, LABELS), "points": 3, "progress": False, **options}
    make_model = options.pop("make_model", net)
    return compute_instability(make_model, train or training_of(), steps, seeds, **options)


class Spy:
    """A train function that writes down how it is called, and may fail at a call."""

    def __init__(self, train: Any = None, fail_at: int | None = None) -> None:
        self.train, self.fail_at = train or training_of(), fail_at
        self.calls: list[tuple[int, int | None, int]] = []

    def __call__(self, model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any:
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        self.calls.append((start, stop, seed))
        assert (state is None) == (start == 0)
        return self.train(model, start=start, stop=stop, seed=seed, state=state)


# --- A landscape whose valleys are known ---


class Wells(nn.Module):
    """w^2 + w x / 2 for targets of 1, samples x being 1 and -1: valleys near w = 1 and -1, loss 1 at w = 0.

    From w = 0 the first samples decide into which valley training runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.w**2 + self.w * inputs / 2


WELLS = TensorDataset(torch.tensor([1.0, -1.0]).repeat(4)[:, None], torch.ones(8, 1))


def test_order_decides_between_two_valleys_until_one_is_entered():
    train = make_train_function(DataLoader(WELLS, batch_size=1, shuffle=True), 6, learning_rate=0.05)
    found = compute_instability(
        lambda _: Wells(),
        train,
        [0, 24],
        seeds=range(6),
        dataloader=WELLS.tensors,
        metric="loss",
        threshold=0.1,
        points=5,
        progress=False,
    )
    initial, later = found["curve"]
    barriers = [pair["loss_barrier"] for pair in found["pairs"] if pair["rewind_step"] == 0]
    assert all(barrier < 0.1 or barrier > 0.6 for barrier in barriers), "one valley, or the hill between two"
    assert sum(barrier > 0.6 for barrier in barriers) >= 2
    assert initial["loss_barrier"] > 0.15
    assert later["loss_barrier"] < 0.05
    assert found["rewind_step"] == 24
    assert found["certain_step"] == 24
    assert found["barrier"] == later["loss_barrier"]
    assert found["interval"] == later["loss_interval"]
    assert found["curve"][0]["error_barrier"] is None


# --- What is trained ---


def plainly(seed: int, order_seeds: tuple[int, int], step: int) -> dict[str, torch.Tensor]:
    """A sibling by a loop of torch's own: one order up to the step, the other from there."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    orders = [
        [batch for epoch in range(4) for batch in DataOrder(loader(), one).epoch(epoch)] for one in order_seeds
    ]
    for inputs, labels in [*orders[0][:step], *orders[1][step:]]:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def test_pairs_are_those_of_a_plain_loop():
    def make_model(seed: int) -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    found = analyse(steps=(0, 5, 7), make_model=make_model)
    assert [(pair["seed"], pair["rewind_step"]) for pair in found["pairs"]] == [
        (seed, step) for seed in (0, 1) for step in (0, 5, 7)
    ]
    for pair in found["pairs"]:
        ends = [
            plainly(pair["seed"], (pair["seed"], other), pair["rewind_step"]) for other in pair["sibling_seeds"]
        ]
        path = compute_linear_mode_connectivity(make_model(0), *ends, (INPUTS, LABELS), points=3)
        assert pair["losses"] == pytest.approx(path["losses"], rel=1e-4)
        assert pair["errors"] == pytest.approx(path["errors"])
        assert pair["loss_barrier"] == pytest.approx(path["loss_barrier"], abs=1e-4)
        assert pair["error_barrier"] == pytest.approx(path["error_barrier"])


def test_a_trunk_is_trained_once_and_every_order_is_another():
    spy = Spy()
    found = analyse(spy, steps=[9, 0, 3], seeds=[4, 2])
    expected = []
    for seed in (4, 2):
        first, second = next(pair["sibling_seeds"] for pair in found["pairs"] if pair["seed"] == seed)
        expected += [(0, None, first), (0, None, second)]
        expected += [(0, 3, seed), (3, None, first), (3, None, second)]
        expected += [(3, 9, seed), (9, None, first), (9, None, second)]
    assert spy.calls == expected
    assert len({seed for pair in found["pairs"] for seed in pair["sibling_seeds"]} | {4, 2}) == 6
    assert [point["rewind_step"] for point in found["curve"]] == [0, 3, 9]


def test_what_is_drawn_is_not_seen_outside_and_decides_nothing_inside():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = analyse()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert analyse() == first
    json.dumps(first)


def test_a_state_is_a_new_copy_for_every_training():
    seen = []

    def train(model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any:
        seen.append(None if state is None else state["moment"].item())
        with torch.no_grad():
            model.w += torch.rand(())
        if state is not None:
            state["moment"] += 100
            return state
        return {"moment": torch.tensor(float(start + (stop or 0)))}

    found = compute_instability(
        lambda _: Wells(), train, [1, 2], [0], dataloader=WELLS.tensors, metric="loss", progress=False
    )
    assert seen == [None, 1, 1, 1, 101, 101]
    assert found["curve"][0]["loss_interval"] is found["certain_step"] is None, "one seed has no interval"


def test_batchnorm_statistics_may_be_recomputed():
    plain, recomputed = analyse(), analyse(recompute_batchnorm=loader())
    assert plain["pairs"][0]["losses"] != recomputed["pairs"][0]["losses"]


# --- The ready-made train function ---


@pytest.mark.parametrize("stops", [[1], [5], [7, 12], [4, 5, 6, 10, 15, 19]])
def test_a_training_that_was_left_ends_like_one_that_was_not(stops):
    def cosine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    train = training_of(scheduler=cosine)
    models = []
    for parts in ([], stops):
        torch.manual_seed(0)
        model, state, start = net(0), None, 0
        torch.manual_seed(len(parts))
        for stop in (*parts, None):
            state = train(model, start=start, stop=stop, seed=3, state=state)
            torch.rand(7)  # whoever pauses may draw
            start = stop or STEPS
            assert state["point"]["step"] == start
        models.append(tensors_of(model))
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())


@pytest.mark.parametrize("step", [5, 7])
def test_the_trunk_is_the_network_that_iterative_pruning_rewinds_to(step):
    torch.manual_seed(1)
    model = net(0)
    twin = copy.deepcopy(model)
    options: Any = {"epochs": 4, "learning_rate": 0.1, "momentum": 0.9}
    training_of(**options)(model, start=0, stop=step, seed=3)
    pruned = compute_iterative_magnitude_pruning(
        twin, loader(), num_iterations=1, rewind_step=step, seed=3, progress=False, **options
    )
    assert all(torch.equal(tensor, pruned["rewind_state"][name]) for name, tensor in tensors_of(model).items())


class Numbered(Dataset):
    """Samples that write down when they are read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.read.append(index)
        return INPUTS[index], LABELS[index]


def test_another_seed_goes_on_in_the_middle_of_its_own_order():
    data = Numbered()
    batches = DataLoader(data, 8, shuffle=True)
    train = training_of(data=batches)

    def order(seed: int, epoch: int) -> list[int]:
        data.read.clear()
        list(DataOrder(batches, seed).epoch(epoch))
        return list(data.read)

    torch.manual_seed(0)
    model = net(0)
    state = train(model, start=0, stop=7, seed=0)
    data.read.clear()
    train(model, start=7, stop=None, seed=9, state=state)
    expected = [index for epoch in (1, 2, 3) for index in order(9, epoch)]
    data.read.clear()
    train(model, start=7, stop=None, seed=9, state=state)
    # The two batches of the second epoch that were trained before are read and passed over.
    assert data.read == expected
    assert order(9, 1) != order(0, 1)


def test_the_end_of_an_epoch_is_left_behind():
    data = Numbered()
    train = training_of(data=DataLoader(data, 8, shuffle=True))
    model = net(0)
    state = train(model, start=0, stop=5, seed=0)
    data.read.clear()
    train(model, start=5, stop=6, seed=0, state=state)
    assert len(data.read) == 8 * 1, "nothing is read to be passed over"


def test_a_state_that_stands_elsewhere_is_refused():
    train, model = training_of(), net(0)
    state = train(model, start=0, stop=2, seed=0)
    with pytest.raises(TrainingError, match=r"start=3.*step 2"):
        train(model, start=3, stop=4, seed=0, state=state)


# --- Tickets ---


@pytest.mark.parametrize("optimizer", ["sgd", "adam", lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr)])
def test_siblings_of_a_ticket_are_held_to_it(optimizer):
    torch.manual_seed(0)
    mask = create_magnitude_mask(net(0), 0.7)
    ends = []

    class Watching(Spy):
        def __call__(self, model: nn.Module, *, stop: int | None, **options: Any) -> Any:
            state = super().__call__(model, stop=stop, **options)
            pruned = torch.cat([model.get_parameter(name)[~kept] for name, kept in mask.items()])
            if stop is None:
                ends.append(bool(pruned.any()))
            else:
                assert pruned.all(), "the trunk is dense"
            return state

    spy = Watching(
        training_of(optimizer=optimizer, momentum=0.9 if optimizer == "sgd" else 0.0, learning_rate=0.01)
    )
    found = analyse(spy, steps=[3, 7], mask=mask)
    assert ends == [False] * 8
    assert found == analyse(spy, steps=[3, 7], mask=dict(mask.items()))
    assert found["pairs"] != analyse(spy.train, steps=[3, 7])["pairs"]


def test_a_ticket_may_belong_to_its_network_and_step():
    asked = []

    def mask_of(seed: int, step: int) -> Mask:
        asked.append((seed, step))
        return Mask.random_like(Mask.ones_like(net(0)), seed)

    analyse(mask=mask_of)
    assert asked == [(0, 0), (0, 7), (1, 0), (1, 7)]


# --- Going on ---


@pytest.mark.parametrize("fail_at", [0, 1, 2, 3, 4, 5, 7, 9])
def test_a_run_that_was_left_goes_on_to_the_same_results(tmp_path, fail_at):
    expected = analyse()
    with pytest.raises(KeyboardInterrupt):
        analyse(Spy(fail_at=fail_at), run_dir=tmp_path)
    spy = Spy()
    assert analyse(spy, run_dir=tmp_path) == expected
    whole = 2 * 5
    assert len(spy.calls) == whole - [0, 0, 2, 2, 2, 5, 7, 7, 7, 7][fail_at], (
        "finished pairs are not trained again"
    )


def test_a_finished_run_is_read_and_another_threshold_is_no_other_run(tmp_path):
    first = analyse(Spy(), run_dir=tmp_path)
    again = analyse(Spy(fail_at=0), run_dir=tmp_path, metric="loss", threshold=100, confidence=0.5)
    assert again["pairs"] == first["pairs"]
    assert again["rewind_step"] == 0
    barriers = [pair["loss_barrier"] for pair in first["pairs"] if pair["rewind_step"] == 0]
    assert again["interval"] == pytest.approx(stats.t.interval(0.5, 1, sum(barriers) / 2, stats.sem(barriers)))


def test_a_run_of_another_configuration_is_refused(tmp_path):
    analyse(run_dir=tmp_path)
    others: list[tuple[dict[str, Any], str]] = [
        ({"steps": (0, 8)}, "rewind_steps"),
        ({"seeds": (0, 2)}, "seeds"),
        ({"points": 5}, "points"),
        ({"recompute_batchnorm": True}, "recompute_batchnorm"),
        ({"mask": Mask.ones_like(net(0))}, "mask"),
        ({"train": training_of(learning_rate=0.2)}, "learning_rate"),
        ({"train": training_of(epochs=5)}, "epochs"),
        ({"make_model": lambda _: nn.Linear(6, 3)}, "model"),
    ]
    for options, named in others:
        with pytest.raises(RunFolderError, match=named):
            analyse(run_dir=tmp_path, **options)
    with pytest.raises(RunFolderError, match="resume"):
        analyse(run_dir=tmp_path, resume=False)


KILLED = """
import json, os, signal, sys
import torch
from test_instability import Spy, analyse

class Killed(Spy):
    def __call__(self, *args, **options):
        if len(self.calls) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*args, **options)

torch.set_num_threads(1)
print(json.dumps(analyse(Killed(), run_dir=sys.argv[1])))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_results(tmp_path):
    source = str(Path(lottery_tickets.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((source, str(Path(__file__).parent)))}

    def run(kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", KILLED, str(tmp_path), str(kill_at)]
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    assert run(3).returncode == -signal.SIGKILL
    assert run(4).returncode == -signal.SIGKILL
    last = run(-1)
    assert last.returncode == 0, last.stderr
    assert json.loads(last.stdout) == json.loads(json.dumps(analyse()))


# --- The curve ---


def pair_of(seed: int, step: int, error: float | None, loss: float = 1.0) -> SiblingPair:
    return SiblingPair(
        seed=seed,
        rewind_step=step,
        sibling_seeds=[1, 2],
        alphas=[0.0, 0.5, 1.0],
        losses=[0.1, 0.2 + loss, 0.3],
        errors=None if error is None else [0.1, 0.15 + error, 0.2],
        loss_barrier=loss,
        error_barrier=error,
    )


def test_means_and_intervals_are_students():
    errors = [0.1, 0.4, 0.2, 0.25]
    pairs = [pair_of(seed, 5, error, loss=2 * error) for seed, error in enumerate(errors)]
    (point,) = summarised(pairs, metric="error", threshold=0.3, confidence=0.9)["curve"]
    expected = stats.t.interval(0.9, len(errors) - 1, loc=0.2375, scale=stats.sem(errors))
    assert point["error_barrier"] == pytest.approx(0.2375)
    assert point["error_interval"] == pytest.approx(expected)
    assert point["loss_barrier"] == pytest.approx(0.475)
    assert point["loss_interval"] == pytest.approx([2 * end for end in expected])
    assert point["loss"] == pytest.approx(0.2)
    assert point["error"] == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("heights", "step", "certain"),
    [
        ({0: (0.3, 0.3), 10: (0.01, 0.01), 20: (0.0, 0.0)}, 10, 10),
        (
            {0: (0.01, 0.01), 10: (0.3, 0.3), 20: (0.0, 0.0)},
            20,
            20,
        ),  # one that lies below by chance is no beginning
        ({0: (0.0, 0.03), 10: (0.01, 0.01)}, 0, 10),  # on the mean, but not surely
        ({0: (0.0, 0.0), 10: (0.02, 0.02)}, None, None),  # the threshold is not below itself
        ({0: (0.0,), 10: (0.0,)}, 0, None),  # a single seed
    ],
)
def test_the_step_from_which_on_the_barrier_lies_below_the_threshold(heights, step, certain):
    pairs = [pair_of(seed, k, height) for k, values in heights.items() for seed, height in enumerate(values)]
    found = summarised(pairs, metric="error", threshold=0.02, confidence=0.95)
    assert (found["rewind_step"], found["certain_step"]) == (step, certain)
    curve = {point["rewind_step"]: point for point in found["curve"]}
    assert found["barrier"] == (None if step is None else curve[step]["error_barrier"])
    assert found["interval"] == (None if step is None else curve[step]["error_interval"])


# --- What cannot be ---


def blind(model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any:
    """Trains, but knows one order only."""
    with torch.no_grad():
        model[0].weight += 1
    return {}


def diverging(model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any:
    with torch.no_grad():
        model[0].weight *= float("nan")
    return {}


def uncopied(model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any:
    with torch.no_grad():
        model[0].weight += torch.rand(())
    return {"open": sys.stdout}


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"steps": []}, TrainingError, "rewind_steps is a sequence of at least one"),
        ({"steps": 3}, TrainingError, "rewind_steps is a sequence"),
        ({"steps": [0, 0]}, TrainingError, "each once"),
        ({"steps": [-1]}, TrainingError, "rewind_steps are non-negative"),
        ({"steps": [2.0]}, TrainingError, "rewind_steps are non-negative"),
        ({"seeds": []}, TrainingError, "seeds is a sequence"),
        ({"seeds": [-1]}, TrainingError, "seed"),
        ({"steps": [STEPS + 1]}, TrainingError, f"ends after {STEPS} steps.*left at step {STEPS + 1}"),
        ({"steps": [STEPS]}, TrainingError, "same network.*no step was left"),
        ({"train": training_of(data=loader(shuffle=False), epochs=1), "make_model": lambda _: nn.Linear(6, 3)},
         TrainingError, "siblings from step 0 are the same"),
        ({"train": blind}, TrainingError, "draws nothing by its seed"),
        ({"train": uncopied}, TrainingError, "state that train returned at step 7 cannot be copied"),
        ({"train": diverging}, lottery_tickets.errors.WeightsError, "NaN or infinite"),
        ({"make_model": lambda _: 3}, TrainingError, r"make_model\(seed\).*int"),
        ({"metric": "accuracy"}, TrainingError, "metric"),
        ({"threshold": -1}, TrainingError, "threshold"),
        ({"confidence": 1.0}, TrainingError, "confidence"),
        ({"points": 1}, EvaluationError, "points"),
        ({"dataloader": []}, EvaluationError, "no batches"),
        ({"loss_fn": F.cross_entropy}, EvaluationError, "metric='loss'"),
        ({"mask": 3}, MaskError, "Mask"),
        ({"mask": {"9.weight": torch.ones(2)}}, MaskMismatchError, r"9\.weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given, error, text):
    with pytest.raises(error, match=f"(?s){text}"):
        analyse(**given)


def test_a_state_that_cannot_be_written_is_refused_where_it_would_be(tmp_path):
    def train(model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> Any:
        with torch.no_grad():
            model[0].weight += torch.rand(())
        return {"when": complex(1, 2)}

    analyse(train)
    with pytest.raises(RunFolderError, match=r"state\.when is of type complex"):
        analyse(train, run_dir=tmp_path)


# --- Memory ---

MEASURE = (
    PEAK
    + """
import torch
from lottery_tickets import compute_instability
from lottery_tickets.planning import free_memory
torch.set_num_threads(1)
width = 1024
def network(depth):
    return torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(depth)))
def train(model, *, start, stop, seed, state=None):
    with torch.no_grad():
        for weight in model.parameters():
            weight.view(-1)[:1000] += torch.rand(1000)
    return {}
def analyse(depth):
    batch = (torch.ones(2, width), torch.ones(2, width))
    compute_instability(
        lambda _: network(depth), train, [0, 1], [0, 1], dataloader=batch, metric="loss", progress=False
    )
free_memory()  # loads what looks at it
analyse(1)  # fills torch's own caches
before = peak()
analyse(16)
print(peak() - before, 16 * width * width * 4)
"""
)


def test_three_copies_of_the_model_are_made():
    # Threads free a tensor sooner or later, so peaks differ from process to process; the smallest of two counts.
    extra, model = min([int(number) for number in run_python(MEASURE).split()] for _ in range(2))
    assert 3.5 * model < extra < 4.25 * model, "the model itself, and three copies"
