"""Operations that would run out of memory are refused before they start, and nothing else is."""

from __future__ import annotations

import inspect
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lottery_tickets
from lottery_tickets import (
    Mask,
    compute_early_bird_tickets,
    compute_instability,
    compute_iterative_magnitude_pruning,
    compute_layerwise_magnitude_ticket,
    compute_linear_mode_connectivity,
    compute_lottery_ticket_qualities,
    compute_lottery_ticket_quality,
    compute_pruning_robustness,
    compute_ticket_verdict,
    create_importance_mask,
    create_magnitude_mask,
)
from lottery_tickets import importance_scoring as scoring
from lottery_tickets.errors import MemoryPlanError, ParameterSelectionError, ScoreError, WeightsError
from lottery_tickets.large_models import load_model, prune_checkpoint
from lottery_tickets.planning import FreeMemory, _guard, refuse_if_too_large
from lottery_tickets.stability import make_train_function
from lottery_tickets.vision import TensorBatches
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
HALF = Mask.from_tensors({"0.weight": torch.arange(128).view(16, 8) % 2 == 0})
LAYER = "model.layers.0.mlp.up_proj.weight"
DATA = torch.utils.data.TensorDataset(torch.randn(16, 8), torch.arange(16) % 2)
LOADER = torch.utils.data.DataLoader(DATA, batch_size=4, shuffle=True)
STATES = network().state_dict(), network().state_dict()


def seeded(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return network()


def own_training(model: nn.Module, *, start: int, stop: int | None, seed: int, state: Any = None) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        model[0].weight.add_(torch.randn(16, 8), alpha=0.01)


def pruned(folder: Any, **more: Any) -> Any:
    output = folder.with_name(f"pruned {more}")
    return prune_checkpoint(folder, {LAYER: torch.ones(16, 8, dtype=torch.bool)}, output, **more)


def widened(folder: Any, **more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    saved = folder / "saved"
    if not saved.is_dir():
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).bfloat16().save_pretrained(saved)
    assert load_model(saved, torch.bfloat16, progress=False).dtype == torch.bfloat16
    return load_model(saved, torch.float32, progress=False, **more)


def verdict(**more: Any) -> Any:
    options = {"seeds": (0, 1), "controls": ("dense", "early_bird"), "margin": 0.1, "epochs": 1}
    return compute_ticket_verdict(seeded, lambda _: (LOADER, BATCH), lambda _: HALF, **options, **more)


def instability(train: Any, **more: Any) -> Any:
    return compute_instability(seeded, train, [0], [0], dataloader=BATCH, **more)


# Each is called with the folder of a checkpoint.
OPERATIONS: dict[str, Callable[..., Any]] = {
    "quality": lambda _, **more: compute_lottery_ticket_quality(network(), MASK, BATCH, **more),
    "qualities": lambda _, **more: compute_lottery_ticket_qualities(network(), {"one": MASK}, BATCH, **more),
    "mask": lambda _, **more: create_magnitude_mask(network(), 0.5, **more),
    "mask of tensors": lambda _, **more: create_magnitude_mask({"w": torch.rand(100)}, [0.5, 0.7], **more),
    "importance mask": lambda _, **more: create_importance_mask({"w": torch.rand(100)}, 0.5, **more),
    "fisher": lambda _, **more: scoring.compute_fisher_importance(network(), BATCH, **more),
    "taylor": lambda _, **more: scoring.compute_gradient_importance(network(), BATCH, "taylor", **more),
    "obd": lambda _, **more: scoring.compute_obd_importance(network(), BATCH, **more),
    "snip": lambda _, **more: scoring.compute_snip_importance(network(), BATCH, **more),
    "taylor, squared": lambda _, **more: scoring.compute_taylor_importance(
        network(), BATCH, order="squared", **more
    ),
    "grad_norm": lambda _, **more: scoring.compute_gradient_norm_importance(network(), BATCH, **more),
    "magnitude": lambda _, **more: scoring.compute_magnitude_importance(network(), **more),
    "wanda": lambda _, **more: scoring.compute_wanda_importance(network(), BATCH, **more),
    "grasp": lambda _, **more: scoring.compute_grasp_importance(network(), BATCH, **more),
    "synflow": lambda _, **more: scoring.compute_synflow_importance(network(), (8,), 2, **more),
    "hybrid": lambda _, **more: scoring.compute_hybrid_importance(
        network(), BATCH, {"magnitude": 1, "obd": 1}, **more
    ),
    "early-bird": lambda _, **more: compute_early_bird_tickets(network(), BATCH, max_epochs=1, **more),
    "iterative": lambda _, **more: compute_iterative_magnitude_pruning(network(), BATCH, 0.5, 1, epochs=1, **more),
    "mask of a checkpoint": lambda folder, **more: create_magnitude_mask(folder, 0.5, **more),
    "pruned copy": pruned,
    "model in another type": widened,
    "layerwise": lambda _, **more: compute_layerwise_magnitude_ticket(network(), 0.5, **more),
    "robustness": lambda _, **more: compute_pruning_robustness(network(), BATCH, **more),
    "connectivity": lambda _, **more: compute_linear_mode_connectivity(network(), *STATES, BATCH, **more),
    "instability": lambda _, **more: instability(make_train_function(LOADER, 1), **more),
    "instability of another's training": lambda _, **more: instability(own_training, **more),
    "verdict": lambda _, **more: verdict(**more),
}


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    save_file({LAYER: torch.randn(16, 8).bfloat16()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_asks_first(name, free, checkpoint):
    with pytest.raises(MemoryPlanError, match="a made-up limit") as caught:
        OPERATIONS[name](checkpoint)
    text = str(caught.value)
    assert "check_memory=False" in text
    assert "  total" in text or "  at least" in text
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]
    OPERATIONS[name](checkpoint, check_memory=False)
    free(1 << 30)
    OPERATIONS[name](checkpoint)


# Functions on models and folders that need no memory to speak of, and why.
NEED_NOTHING = {
    **dict.fromkeys(("applied", "held"), "a packed mask that is there, and one layer's copy"),
    **dict.fromkeys(("apply_mask", "remove_mask"), "in place; what is removed is kept for those who ask for it"),
    **dict.fromkeys(("compute_sparsity", "get_model_size", "validate_pruning_correctness"), "block by block"),
    "prunable_parameters": "no copies",
    "ensure_deterministic_pruning": "no copies",
    **dict.fromkeys(("read_checkpoint", "resolve_model"), "headers"),
    **dict.fromkeys(("map_weights", "map_parameters"), "the system's pages"),
    "map_model": "a block at a time; what runs through it asks for itself",
    "compute_weights_digest": "block by block",
    "load_tokenizer": "no weights",
    "plan_memory": "shapes",
    "compute_verdict_from_scores": "a number for each seed",
    "create_structured_mask": "a number for each unit, and the masks",
    "extract_subnetwork": "the smaller model, and no more",
    "embed_subnetwork": "in place",
    "copy_companions": "files that hold no weights",
}
HOMES = (
    "importance_scoring",
    "large_models",
    "stability",
    "verdict",
    "evaluation",
    "early_bird",
    "iterative_pruning",
)
SUBJECTS = {"model", "make_model", "folder", "subject", "model_or_config", "scores"}


def public_operations() -> dict[str, Callable[..., Any]]:
    modules = [lottery_tickets, *(import_module(f"lottery_tickets.{home}") for home in HOMES)]
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {
        name: one
        for name, one in found.items()
        if inspect.isfunction(one) and SUBJECTS & inspect.signature(one).parameters.keys()
    }


@pytest.mark.parametrize("name", public_operations())
def test_every_public_function_on_a_model_or_folder_asks_or_needs_nothing(name):
    parameters = inspect.signature(public_operations()[name]).parameters
    passed_on = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    asks = passed_on or "check_memory" in parameters
    assert asks != (name in NEED_NOTHING)


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
    assert _guard.sizes_of([ids, ids]) == _guard.sizes_of(ids) == (3, 7)
    assert _guard.sizes_of(BATCH) == (4, 1)
    assert _guard.sizes_of(loader) == _guard.sizes_of(TensorBatches(*BATCH, batch_size=2)) == (2, 1)
    for other in (None, iter([ids]), [], "nonsense", [3]):
        assert _guard.sizes_of(other) == (1, 1)


def test_small_models_are_let_through(monkeypatch):
    def never(_device: object) -> FreeMemory:
        raise AssertionError("asked for what is free")

    monkeypatch.setattr(_guard, "free_memory", never)
    OPERATIONS["fisher"](None)
    OPERATIONS["early-bird"](None)


def test_where_nothing_is_known_nothing_is_refused(free, monkeypatch):
    monkeypatch.setattr(_guard, "free_memory", lambda _device: None)
    OPERATIONS["fisher"](None)
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


@pytest.fixture
def memory_group(tmp_path) -> Iterator[Path]:
    """A new control group that limits memory, where this machine lets us make one."""
    root = Path("/sys/fs/cgroup")
    home = root / "memory" if (root / "memory").is_dir() else root
    group = home / f"lottery-tickets-{os.getpid()}-{tmp_path.name}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        limit = next((group / name for name in LIMITS if os.access(group / name, os.W_OK)), None)
        if limit is None:
            pytest.skip("control groups made here have no limit of memory to set")
        yield limit
    finally:
        group.rmdir()


LIMITS = ("memory.limit_in_bytes", "memory.max")  # versions 1 and 2
IN_A_GROUP = """
import os, sys
from pathlib import Path
import torch
from lottery_tickets.errors import MemoryPlanError
from lottery_tickets.importance_scoring import compute_magnitude_importance
model = torch.nn.Linear(8192, 4096, bias=False)
compute_magnitude_importance(torch.nn.Linear(2, 2))
limit = Path(sys.argv[1])
limit.write_text(str(64 << 20))
(limit.parent / "cgroup.procs").write_text(str(os.getpid()))
try:
    compute_magnitude_importance(model, check_memory=sys.argv[2] == "asked")
except MemoryPlanError as error:
    print(str(error).splitlines()[0])
limit.write_text(str(512 << 20))
print(len(compute_magnitude_importance(model)))
"""


def test_a_real_control_group_below_the_need_is_an_error(memory_group):
    """32 million weights take 128 MiB of scores; there are 64, then 512."""
    refused, done = run_python(IN_A_GROUP, memory_group, "asked").splitlines()
    assert refused.startswith("magnitude needs 134 MB besides what is loaded")
    assert f"control group /{memory_group.parent.name}" in refused
    assert done == "1"


@pytest.mark.slow
def test_and_is_a_kill_where_nobody_asks(memory_group):
    command = [sys.executable, "-c", IN_A_GROUP, memory_group, "not asked"]
    package = str(Path(lottery_tickets.__file__).parents[1])
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": package}
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, "")
