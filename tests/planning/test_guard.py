"""Operations that would run out of memory are refused before they start, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lottery_tickets import (
    Mask,
    compute_early_bird_tickets,
    compute_iterative_magnitude_pruning,
    compute_lottery_ticket_qualities,
    compute_lottery_ticket_quality,
    create_importance_mask,
    create_magnitude_mask,
)
from lottery_tickets import importance_scoring as scoring
from lottery_tickets.errors import MemoryPlanError, ParameterSelectionError, ScoreError, WeightsError
from lottery_tickets.planning import FreeMemory, _guard, refuse_if_too_large
from processes import run_python

MIB = 1 << 20


@pytest.fixture
def free(monkeypatch) -> Callable[[int], None]:
    """Sets what is free; until then, nothing is."""
    monkeypatch.setattr(_guard, "_SMALL", 0)

    def set_to(count: int) -> None:
        monkeypatch.setattr(_guard, "free_memory", lambda _device: FreeMemory(count, "a made-up limit"))

    set_to(0)
    return set_to


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 2, bias=False))


BATCH = (torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))
MASK = Mask.from_tensors({"0.weight": torch.ones(16, 8, dtype=torch.bool)})
OPERATIONS: dict[str, Callable[..., Any]] = {
    "quality": lambda **more: compute_lottery_ticket_quality(network(), MASK, BATCH, **more),
    "qualities": lambda **more: compute_lottery_ticket_qualities(network(), {"one": MASK}, BATCH, **more),
    "mask": lambda **more: create_magnitude_mask(network(), 0.5, **more),
    "mask of tensors": lambda **more: create_magnitude_mask({"w": torch.rand(100)}, [0.5, 0.7], **more),
    "importance mask": lambda **more: create_importance_mask({"w": torch.rand(100)}, 0.5, **more),
    "fisher": lambda **more: scoring.compute_fisher_importance(network(), BATCH, **more),
    "taylor": lambda **more: scoring.compute_gradient_importance(network(), BATCH, "taylor", **more),
    "magnitude": lambda **more: scoring.compute_magnitude_importance(network(), **more),
    "wanda": lambda **more: scoring.compute_wanda_importance(network(), BATCH, **more),
    "grasp": lambda **more: scoring.compute_grasp_importance(network(), BATCH, **more),
    "synflow": lambda **more: scoring.compute_synflow_importance(network(), (8,), 2, **more),
    "hybrid": lambda **more: scoring.compute_hybrid_importance(
        network(), BATCH, {"magnitude": 1, "obd": 1}, **more
    ),
    "early-bird": lambda **more: compute_early_bird_tickets(network(), BATCH, max_epochs=1, **more),
    "iterative": lambda **more: compute_iterative_magnitude_pruning(network(), BATCH, 0.5, 1, epochs=1, **more),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_asks_first(name, free):
    with pytest.raises(MemoryPlanError, match="a made-up limit") as caught:
        OPERATIONS[name]()
    text = str(caught.value)
    assert "check_memory=False" in text
    assert "  weights" in text
    OPERATIONS[name](check_memory=False)
    free(1 << 30)
    OPERATIONS[name]()


def test_nothing_has_happened(free):
    model = network()
    before = [one.detach().clone() for one in model.parameters()]
    drawn = torch.get_rng_state()
    with pytest.raises(MemoryPlanError):
        compute_early_bird_tickets(model, BATCH, max_epochs=1)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model.training


def test_what_is_loaded_is_not_asked_for_again(free):
    model = nn.Linear(100, 100, bias=False)
    free(4 * 100 * 100)
    refuse_if_too_large("magnitude", model, check=True)
    free(4 * 100 * 100 - 1)
    with pytest.raises(MemoryPlanError, match="needs 40 kB besides"):
        refuse_if_too_large("magnitude", model, check=True)


def test_the_table_says_what_would_fit(free):
    model = nn.Linear(1000, 100, bias=False)
    free(500_000)
    with pytest.raises(MemoryPlanError, match="store='disk'") as caught:
        refuse_if_too_large("fisher", nn.Sequential(model, nn.Linear(100, 100, bias=False)), check=True)
    assert "does not fit" in str(caught.value)


def test_a_generator_is_not_drawn_from(free):
    def batches() -> Iterator[Any]:
        yield BATCH
        raise AssertionError("asked for a second batch")

    given = batches()
    with pytest.raises(MemoryPlanError):
        compute_lottery_ticket_quality(network(), MASK, given)
    assert next(given) is BATCH


def test_batches_are_known_from_lists_and_loaders():
    ids = {"input_ids": torch.zeros(3, 7, dtype=torch.int64)}
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*BATCH), batch_size=2)
    assert _guard._sizes([ids, ids]) == _guard._sizes(ids) == (3, 7)
    assert _guard._sizes(BATCH) == (4, 1)
    assert _guard._sizes(loader) == (2, 1)
    for other in (None, iter([ids]), [], "nonsense", [3]):
        assert _guard._sizes(other) == (1, 1)


def test_small_models_are_let_through(monkeypatch):
    def never(_device: object) -> FreeMemory:
        raise AssertionError("asked for what is free")

    monkeypatch.setattr(_guard, "free_memory", never)
    OPERATIONS["fisher"]()
    OPERATIONS["early-bird"]()


def test_where_nothing_is_known_nothing_is_refused(free, monkeypatch):
    monkeypatch.setattr(_guard, "free_memory", lambda _device: None)
    OPERATIONS["fisher"]()
    refuse_if_too_large("mask", nn.Linear(4, 4, device="meta"), check=True)


def test_errors_of_the_operation_come_from_the_operation(free):
    with pytest.raises(ParameterSelectionError):
        scoring.compute_fisher_importance(network(), BATCH, exclude="*")
    with pytest.raises(WeightsError, match="expected a tensor"):
        create_importance_mask({"w": [1.0, 2.0]}, 0.5)
    with pytest.raises(ScoreError, match="importance_type"):
        scoring.compute_gradient_importance(network(), BATCH, "luck")


def test_training_on_an_accelerator_may_halve_its_batches(free, monkeypatch):
    seen = []
    monkeypatch.setattr(_guard, "_only_device", lambda _subject: torch.device("cuda"))
    monkeypatch.setitem(
        _guard.OPERATIONS, "early-bird", lambda shapes, options: seen.append(options) or _guard.Bytes()
    )
    refuse_if_too_large("early-bird", network(), BATCH, check=True)
    assert seen[0].batch_size == 1


@pytest.mark.parametrize("kind", ["AS", "DATA"])
def test_a_real_limit_below_the_need_is_an_error_and_not_a_kill(kind):
    """32 million weights take 128 MiB of scores; there are 64, then 512."""
    used = {"AS": "VmSize", "DATA": "VmData"}[kind]
    code = f"""
import resource
import torch
from lottery_tickets.errors import MemoryPlanError
from lottery_tickets.importance_scoring import compute_magnitude_importance
model = torch.nn.Linear(8192, 4096, bias=False)
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("{used}"))
hard = resource.getrlimit(resource.RLIMIT_{kind})[1]
resource.setrlimit(resource.RLIMIT_{kind}, (used + 64 * {MIB}, hard))
try:
    compute_magnitude_importance(model)
except MemoryPlanError as error:
    print(str(error).splitlines()[0])
resource.setrlimit(resource.RLIMIT_{kind}, (used + 512 * {MIB}, hard))
print(len(compute_magnitude_importance(model)))
"""
    refused, done = run_python(code).splitlines()
    assert refused.startswith("magnitude needs 134 MB besides what is loaded")
    assert f"process limit (RLIMIT_{kind})" in refused
    assert done == "1"
