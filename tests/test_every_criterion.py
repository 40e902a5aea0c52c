"""What holds of the scores of every criterion, whatever it ranks by."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import scoring
from lottery_tickets import create_importance_mask, importance_scoring, prunable_parameters
from lottery_tickets.errors import LayerCollapseWarning, ScoreError
from lottery_tickets.gradients import Sums
from lottery_tickets.importance_scoring import (
    compute_fisher_importance,
    compute_gradient_importance,
    compute_gradient_norm_importance,
    compute_grasp_importance,
    compute_hybrid_importance,
    compute_magnitude_importance,
    compute_obd_importance,
    compute_snip_importance,
    compute_synflow_importance,
    compute_taylor_importance,
    compute_wanda_importance,
)

Scorer = Callable[..., dict[str, torch.Tensor]]

OF_SAMPLES: dict[str, Scorer] = {
    "grad_norm": compute_gradient_norm_importance,
    "taylor": compute_taylor_importance,
    "taylor squared": partial(compute_taylor_importance, order="squared"),
    "fisher": compute_fisher_importance,
    "obd": compute_obd_importance,
}
BY_GRADIENTS: dict[str, Scorer] = {
    **OF_SAMPLES,
    "fisher true": partial(compute_fisher_importance, kind="true"),
    "fisher batch": partial(compute_fisher_importance, kind="batch"),
    "snip": compute_snip_importance,
}
FROM_DATA: dict[str, Scorer] = {
    **BY_GRADIENTS,
    "grasp": compute_grasp_importance,
    "wanda": compute_wanda_importance,
    "hybrid": partial(compute_hybrid_importance, weights={"magnitude": 1.0, "taylor": 0.5, "wanda": 0.5}),
}
# Scores that do not depend on how samples are ordered and batched: all but those that say so by name.
OF_SETS = {name: scorer for name, scorer in FROM_DATA.items() if name not in ("fisher true", "fisher batch")}
MODELS: dict[str, Callable[[], tuple[nn.Module, scoring.Batches]]] = {
    "cnn": lambda: (scoring.cnn(), scoring.pairs(3, 8, 8)),
    "reused": lambda: (scoring.Reused(), scoring.pairs(6)),
    "llama, tied": lambda: (scoring.llama(tie_word_embeddings=True), scoring.texts()),
}
# Scores are compared with these at most apart, by the largest of their tensor.
ROUNDING = 1e-5


@pytest.fixture(autouse=True)
def _one_thread():
    """The models are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=MODELS)
def material(request: pytest.FixtureRequest) -> tuple[nn.Module, scoring.Batches]:
    torch.manual_seed(3)
    return MODELS[request.param]()


WITHOUT_DATA: dict[str, Scorer] = {
    "magnitude": lambda model, _batches: compute_magnitude_importance(model),
    "synflow": lambda model, _batches: compute_synflow_importance(model, (6,), rounds=3),
}
RANKING = ("hybrid", "synflow")  # ranks over all of a model, which cost the same for the smallest


def scorers_for(model: nn.Module) -> dict[str, Scorer]:
    """All of them for one model, for others those that are quick."""
    everything = FROM_DATA | WITHOUT_DATA
    if isinstance(model, scoring.Reused):
        return everything
    return {name: scorer for name, scorer in everything.items() if name not in RANKING}


def double(scores: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: score.double() for name, score in scores.items()}


def shuffled(batches: scoring.Batches) -> scoring.Batches:
    """The same samples in another order, one to a batch."""
    singly = [_row(batch, row) for batch in batches for row in range(scoring.rows(batch))]
    return [singly[place] for place in torch.randperm(len(singly), generator=torch.Generator().manual_seed(1))]


def _row(batch: Any, row: int) -> Any:
    """A sample as a batch, padding and all."""
    if isinstance(batch, dict):
        return {name: one[row : row + 1] for name, one in batch.items()}
    return tuple(one[row : row + 1] for one in batch)


# ---------------------------------------------------------------- what scores are


def test_scores_are_float32_of_the_prunable_weights_and_none_but_grasps_is_negative(material: Any) -> None:
    model, batches = material
    shapes = {name: weight.shape for name, weight in prunable_parameters(model).items()}
    for name, scorer in scorers_for(model).items():
        scores = scorer(model, batches)
        assert {key: score.shape for key, score in scores.items()} == shapes, name
        assert {score.dtype for score in scores.values()} == {torch.float32}, name
        assert {score.device.type for score in scores.values()} == {"cpu"}, name
        assert all(bool((score >= 0).all()) for score in scores.values()) == (name != "grasp"), name
        assert any(bool(score.any()) for score in scores.values()), name


def test_masks_of_every_criterion_are_nested_in_sparsity(material: Any) -> None:
    model, batches = material
    sparsities = [0.0, 0.05, 0.3, 0.31, 0.6, 0.95]
    numel = sum(weight.numel() for weight in prunable_parameters(model).values())
    for name, scorer in scorers_for(model).items():
        scores = scorer(model, batches)
        keep: Any = "smallest" if name == "grasp" else "largest"
        spreads: list[dict[str, Any]] = [{"scope": "global"}, {"scope": "layer"}]
        spreads += [] if name == "grasp" else [{"allocation": "lamp"}]
        for spread in spreads:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", LayerCollapseWarning)
                masks = create_importance_mask(scores, sparsities, model=model, keep=keep, **spread)
            if spread.get("scope") != "layer":
                assert [mask.numel - mask.kept for mask in masks] == [round(one * numel) for one in sparsities]
            for wide, narrow in itertools.pairwise(masks):
                assert (narrow & ~wide).kept == 0, (name, spread)


# ---------------------------------------------------------------- which samples, in which order


def test_the_order_and_the_batches_of_samples_change_nothing(material: Any) -> None:
    model, batches = material
    for name in OF_SETS.keys() & scorers_for(model).keys():
        # Ranks move by a place where scores differ in their last bits.
        tolerance = 0.02 if name == "hybrid" else ROUNDING
        scores = OF_SETS[name](model, batches)
        assert scoring.error(OF_SETS[name](model, shuffled(batches)), double(scores)) < tolerance, name


def test_num_samples_cuts_a_batch(material: Any) -> None:
    model, batches = material
    size = scoring.rows(batches[0])
    half = [{key: one[:1] for key, one in batches[1].items()}] if isinstance(batches[1], dict) else None
    cut = [batches[0], *(half or [tuple(one[:1] for one in batches[1])])]
    for name in FROM_DATA.keys() & scorers_for(model).keys():
        scores = FROM_DATA[name](model, batches, num_samples=size + 1)
        expected = FROM_DATA[name](model, cut, num_samples=None)
        assert all(torch.equal(scores[key], score) for key, score in expected.items()), name


def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)
    model, batches = scoring.llama(), scoring.texts((3,))
    longer = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 4), value=7),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 4)),
        }
        for batch in batches
    ]
    for name in OF_SETS.keys() & scorers_for(model).keys():
        scores = OF_SETS[name](model, batches)
        assert scoring.error(OF_SETS[name](model, longer), double(scores)) < ROUNDING, name


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("name", BY_GRADIENTS)
def test_chunks_and_stores_give_the_same_bits(material: Any, name: str, tmp_path: Path) -> None:
    model, batches = material
    expected = BY_GRADIENTS[name](model, batches)
    ways: list[dict[str, Any]] = [
        {"chunk_size": 1},
        {"chunk_size": 200, "store": "device"},
        {"store": "disk"},
        {"store": tmp_path / "scores.safetensors"},
    ]
    for way in ways:
        scores = BY_GRADIENTS[name](model, batches, **way)
        assert list(scores) == list(expected)
        assert all(torch.equal(scores[key], score) for key, score in expected.items()), way


def test_twice_the_same(material: Any) -> None:
    model, batches = material
    for name, scorer in scorers_for(model).items():
        first, again = scorer(model, batches), scorer(model, batches)
        assert all(torch.equal(again[key], score) for key, score in first.items()), name


# ---------------------------------------------------------------- what is left behind


class Stumbles(nn.Module):
    """A model that fails in a forward pass of choice, from inside."""

    def __init__(self, model: nn.Module, survives: int) -> None:
        super().__init__()
        self.model = model
        self.left = survives

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("in the middle")
        return self.model(x)


class FailsOnTheWayBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("on the way back")


def state_of(model: nn.Module) -> Any:
    """All that scoring could leave behind, to the bit."""

    def bits(one: torch.Tensor | None) -> Any:
        return None if one is None else (one.dtype, one.detach().numpy().tobytes())

    modules = [
        (
            module.training,
            sorted(vars(module)),
            [len(hooks) for key, hooks in sorted(vars(module).items()) if key.endswith("_hooks")],
        )
        for module in model.modules()
    ]
    parameters = [
        (
            one.requires_grad,
            bits(one),
            bits(one.grad),
            len(one._backward_hooks or {}),
            one._post_accumulate_grad_hooks,
        )
        for one in model.parameters()
    ]
    return modules, parameters, [bits(one) for one in model.buffers()]


def marked(model: nn.Module) -> None:
    """Modes, flags and gradients that nobody could take for their defaults."""
    model.train()
    next(model.children()).eval()
    for turn, one in enumerate(model.parameters()):
        one.requires_grad_(turn % 3 != 1)
        one.grad = torch.full_like(one, float(turn)) if turn % 2 else None


def test_the_model_comes_back_as_it_was(material: Any) -> None:
    model, batches = material
    marked(model)
    before, random, grad = state_of(model), torch.random.get_rng_state(), torch.is_grad_enabled()
    for name, scorer in scorers_for(model).items():
        scorer(model, batches)
        assert state_of(model) == before, name
        assert torch.equal(torch.random.get_rng_state(), random), name
        assert torch.is_grad_enabled() == grad, name


@pytest.mark.parametrize("name", FROM_DATA)
@pytest.mark.parametrize("survives", [0, 1, 2])
def test_the_model_comes_back_after_an_exception_in_a_forward_pass(name: str, survives: int) -> None:
    torch.manual_seed(0)
    model = Stumbles(scoring.mlp(), 10**6)
    batches = scoring.pairs(7, sizes=(2, 2, 2, 2, 2))
    marked(model)
    model.left = survives
    before, random = state_of(model), torch.random.get_rng_state()
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        FROM_DATA[name](model, batches)
    assert state_of(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("name", [*BY_GRADIENTS, "grasp"])
def test_the_model_comes_back_after_an_exception_in_a_backward_pass(name: str) -> None:
    torch.manual_seed(0)

    class Fragile(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, *others = self
            x = FailsOnTheWayBack.apply(first(x))
            for one in others:
                x = one(x)
            return x

    model = Fragile(*scoring.mlp())
    marked(model)
    before = state_of(model)
    with pytest.raises(ZeroDivisionError, match="on the way back"):
        FROM_DATA[name](model, scoring.pairs(7), **({} if name == "grasp" else {"checkpoint_activations": True}))
    assert state_of(model) == before


# ---------------------------------------------------------------- small, large, and how many


def test_small_squares_are_not_lifted_and_zeros_stay_zero() -> None:
    model = nn.Linear(3, 1, bias=False)
    inputs = torch.tensor([[1e-18, 0.0, 1.0]])
    own: Any = lambda logits, _targets: logits.sum(1)  # noqa: E731
    scores = compute_fisher_importance(model, (inputs, torch.zeros(1, 1)), loss_fn=own)["weight"]
    assert scores.double().flatten().tolist() == pytest.approx([1e-36, 0.0, 1.0], rel=1e-6, abs=0)
    assert scores[0, 1] == 0


@pytest.mark.parametrize("name", [*OF_SAMPLES, "fisher batch", "snip", "grasp"])
def test_overflow_names_the_tensor(name: str) -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for one in model.parameters():
        nn.init.ones_(one)
    # Finite, and its derivative, twice itself, is not.
    steep: Any = lambda logits, _targets: logits.square().sum(1) * 2.5e38  # noqa: E731
    with pytest.raises(ScoreError, match=r"[01]\.weight: scores reach"):
        FROM_DATA[name](model, (torch.ones(1, 1), torch.ones(1, 1)), loss_fn=steep)


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_what_is_reported_is_what_a_slow_count_gives(name: str) -> None:
    torch.manual_seed(0)
    model, batches = scoring.llama(), scoring.texts()
    batches[1]["attention_mask"][1, 1:] = 0  # one token predicts nothing: no label
    scores, stats = OF_SAMPLES[name](model, batches, return_stats=True)
    singly = [_row(batch, row) for batch in batches for row in range(scoring.rows(batch))]
    counted = [one for one in singly if int(one["attention_mask"].sum()) > 1]
    assert len(counted) == len(singly) - 1
    assert stats["num_samples"] == len(counted)
    alone = [OF_SAMPLES[name](model, one) for one in counted]
    for key, score in scores.items():
        means = torch.stack([one[key].double().mean() for one in alone])
        assert stats["mean_scores"][key] == pytest.approx(float(score.double().mean()), rel=1e-6)
        assert stats["mean_scores"][key] == pytest.approx(float(means.mean()), rel=1e-4)
        error = float(means.std() / math.sqrt(len(means)))
        assert stats["standard_errors"][key] == pytest.approx(error, rel=1e-4)


def test_sums_add() -> None:
    """Sums over some samples and sums over the others add up to the sums over all, as ranks of a group would."""
    torch.manual_seed(0)
    like = {"a": torch.zeros(3, 4), "b": torch.zeros(5)}
    samples = [{name: torch.randn(one.shape) for name, one in like.items()} for _ in range(6)]
    parts = [Sums(like, ["signed", "absolute", "square"], "cpu") for _ in range(3)]
    for turn, sample in enumerate(samples):
        for sums in (parts[turn % 2], parts[2]):
            for name, gradient in sample.items():
                sums.receive(name, 0, gradient.clone())
    for statistic in ("signed", "absolute", "square"):
        first, second, whole = (sums.tensors[statistic].all() for sums in parts)
        for name in like:
            torch.testing.assert_close(first[name] + second[name], whole[name])


# ---------------------------------------------------------------- data types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_other_types_score_as_float32_ones_nearly_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, batches = scoring.mlp(), scoring.pairs(7)
    for one in model.parameters():
        one.data = one.data.to(torch.bfloat16).float()  # every type holds these
    scorers = {name: scorer for name, scorer in OF_SETS.items() if name != "hybrid"}
    expected = {name: scorer(model, batches) for name, scorer in scorers.items()}
    expected["magnitude"] = compute_magnitude_importance(model)
    model.to(dtype)
    narrow = [(inputs.to(dtype), targets) for inputs, targets in batches]
    for name, scores in expected.items():
        found = compute_magnitude_importance(model) if name == "magnitude" else OF_SETS[name](model, narrow)
        # A tensor's largest score is the measure. The inputs are rounded too, which GraSP feels most.
        narrowly = 0.5 if name == "grasp" else 0.15
        tolerance = 0.0 if name == "magnitude" else 1e-4 if dtype == torch.float64 else narrowly
        assert scoring.error(found, double(scores)) <= tolerance, name


def test_integer_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    batch = (torch.ones(1, 2), torch.zeros(1, dtype=torch.int64))
    for scorer in (*FROM_DATA.values(), lambda model, _batch: compute_magnitude_importance(model)):
        with pytest.raises(ScoreError, match=r"0\.weight is torch\.int8"):
            scorer(model, batch)


# ---------------------------------------------------------------- the promised surface


def test_the_signature_is_the_promised_one() -> None:
    parameters = inspect.signature(compute_gradient_importance).parameters
    by_position = {name: one.default for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD}
    assert list(by_position) == [
        *("model", "dataloader", "importance_type", "num_samples", "chunk_size", "use_mixed_precision"),
        "gradient_clip",
    ]
    assert list(by_position.values())[3:] == [100, None, True, None]
    assert {"loss_fn", "include", "exclude", "store", "seed"} <= parameters.keys() - by_position.keys()
    assert inspect.signature(compute_synflow_importance).parameters["rounds"].default == 100
    assert inspect.signature(compute_wanda_importance).parameters["num_samples"].default == 128
    families = ("magnitude", "gradient_norm", "taylor", "fisher", "snip", "grasp", "synflow", "wanda", "hybrid")
    assert {f"compute_{family}_importance" for family in families} <= set(importance_scoring.__all__)
