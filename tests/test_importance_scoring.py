"""Scores against a loop over single samples, and what they leave behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import scoring
from lottery_tickets import prunable_parameters
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients import add_ranks
from lottery_tickets.importance_scoring import (
    compute_fisher_importance,
    compute_gradient_importance,
    compute_gradient_norm_importance,
    compute_grasp_importance,
    compute_hybrid_importance,
    compute_magnitude_importance,
    compute_obd_importance,
    compute_snip_importance,
    compute_taylor_importance,
    compute_wanda_importance,
)

TOLERANCE = 1e-5


class Case(NamedTuple):
    model: nn.Module
    batches: scoring.Batches
    losses: scoring.Losses
    include: Any = None


MAKERS: dict[str, Callable[[], Case]] = {
    "mlp": lambda: Case(scoring.mlp(), scoring.pairs(7), scoring.class_losses),
    "mlp and biases": lambda: Case(scoring.mlp(), scoring.pairs(7), scoring.class_losses, "*.bias"),
    "cnn": lambda: Case(scoring.cnn(), scoring.pairs(3, 8, 8), scoring.class_losses),
    "signals": lambda: Case(scoring.signals(), scoring.pairs(3, 11), scoring.class_losses),
    "reused": lambda: Case(scoring.Reused(), scoring.pairs(6), scoring.class_losses),
    "functional": lambda: Case(scoring.Functional(), scoring.token_pairs(), scoring.class_losses),
    "functional, batch as long as the text": lambda: Case(
        scoring.Functional(), scoring.token_pairs((5,)), scoring.class_losses
    ),
    "llama": lambda: Case(scoring.llama(), scoring.texts(), scoring.text_losses),
    "llama, tied, with its embedding": lambda: Case(
        scoring.llama(tie_word_embeddings=True), scoring.texts(), scoring.text_losses, "*embed_tokens.weight"
    ),
    "gpt2": lambda: Case(scoring.gpt2(), scoring.texts(), scoring.text_losses),
    "bert": lambda: Case(scoring.bert(), scoring.labelled_texts(), scoring.labelled_losses),
    "albert": lambda: Case(scoring.albert(), scoring.labelled_texts(), scoring.labelled_losses),
}


@pytest.fixture(params=MAKERS)
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(1)
    return MAKERS[request.param]()


def test_scores_are_those_of_a_loop_over_samples(case: Case) -> None:
    model, batches, losses, include = case
    weights = prunable_parameters(model, include)
    samples = scoring.gradients(model, weights, batches, losses)
    w = {name: weight.detach().double() for name, weight in weights.items()}

    def expected(score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: scoring.mean([score(w[name], one[name]) for one in samples]) for name in w}

    mean = {name: scoring.mean([one[name] for one in samples]) for name in w}
    options: dict[str, Any] = {"include": include}
    for scores, slow in (
        (compute_gradient_norm_importance(model, batches, **options), expected(lambda w, g: g.abs())),
        (compute_taylor_importance(model, batches, **options), expected(lambda w, g: (w * g).abs())),
        (
            compute_taylor_importance(model, batches, order="squared", **options),
            expected(lambda w, g: (w * g) ** 2),
        ),
        (compute_fisher_importance(model, batches, **options), expected(lambda w, g: g**2)),
        (compute_obd_importance(model, batches, **options), expected(lambda w, g: w**2 * g**2 / 2)),
        (compute_snip_importance(model, batches, **options), {name: (w[name] * mean[name]).abs() for name in w}),
    ):
        assert scoring.error(scores, slow) < TOLERANCE


def test_the_batch_fisher_squares_means_over_batches(case: Case) -> None:
    model, batches, losses, include = case
    weights = prunable_parameters(model, include)
    by_batch = [scoring.gradients(model, weights, [batch], losses) for batch in batches]
    expected = {
        name: scoring.mean([scoring.mean([one[name] for one in samples]) ** 2 for samples in by_batch])
        for name in weights
    }
    scores = compute_fisher_importance(model, batches, kind="batch", include=include)
    assert scoring.error(scores, expected) < TOLERANCE


def test_clipping_is_by_the_norm_over_all_weights_of_each_sample(case: Case) -> None:
    model, batches, losses, include = case
    weights = prunable_parameters(model, include)
    samples = scoring.gradients(model, weights, batches, losses)
    norms = sorted(float(torch.cat([one.flatten() for one in sample.values()]).norm()) for sample in samples)
    longest = norms[len(norms) // 2] * 0.9
    samples = scoring.clipped(samples, longest)
    expected = {name: scoring.mean([one[name] ** 2 for one in samples]) for name in weights}
    options: dict[str, Any] = {"include": include, "gradient_clip": longest}
    for chunk_size in (None, 100):
        scores = compute_fisher_importance(model, batches, chunk_size=chunk_size, **options)
        assert scoring.error(scores, expected) < TOLERANCE
    snip = {
        name: (weight.detach().double() * scoring.mean([one[name] for one in samples])).abs()
        for name, weight in weights.items()
    }
    assert scoring.error(compute_snip_importance(model, batches, **options), snip) < TOLERANCE


def test_the_order_and_the_batching_of_samples_change_nothing(case: Case) -> None:
    model, batches, _, include = case
    scores = compute_fisher_importance(model, batches, include=include)
    turned = [_turned(batch) for batch in reversed(batches)]
    assert scoring.error(compute_fisher_importance(model, turned, include=include), _double(scores)) < TOLERANCE
    checkpointed = compute_fisher_importance(model, batches, include=include, checkpoint_activations=True)
    assert scoring.error(checkpointed, _double(scores)) < TOLERANCE


def test_the_model_comes_back_as_it_was(case: Case) -> None:
    model, batches, _, include = case
    model.train()
    next(model.children()).eval()
    first = next(iter(model.parameters()))
    first.grad = torch.ones_like(first)
    before, random = _described(model), torch.random.get_rng_state()
    compute_taylor_importance(model, batches, include=include, checkpoint_activations=True)
    assert _described(model) == before
    with pytest.raises((RuntimeError, IndexError)):
        compute_taylor_importance(
            model, [batches[0], _broken(batches[0])], include=include, checkpoint_activations=True
        )
    assert _described(model) == before
    assert torch.equal(torch.random.get_rng_state(), random)


def _double(scores: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: score.double() for name, score in scores.items()}


def _turned(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {name: one.flip(0) for name, one in batch.items()}
    return tuple(one.flip(0) for one in batch)


def _broken(batch: Any) -> Any:
    if isinstance(batch, dict):
        return {**batch, "input_ids": batch["input_ids"] + 10**6}
    inputs, targets = batch
    return (inputs + 10**6 if inputs.dtype == torch.int64 else inputs[:, :-1]), targets


def _described(model: nn.Module) -> Any:
    return copy.deepcopy(
        [
            [(one.requires_grad, one.grad, one.detach().clone()) for one in model.parameters()].__repr__(),
            [
                (module.training, "forward" in vars(module), len(module._forward_hooks))
                for module in model.modules()
            ],
        ]
    )


# ---------------------------------------------------------------- criteria that are no means over samples


def test_grasp_is_a_double_backward(case: Case) -> None:
    model, batches, losses, include = case
    weights = prunable_parameters(model, include)
    expected = scoring.grasp(model, weights, batches, losses)
    scores = compute_grasp_importance(model, batches, include=include)
    assert any(bool((score < 0).any()) for score in scores.values())
    assert scoring.error(scores, expected) < TOLERANCE


@pytest.mark.parametrize("maker", [name for name, maker in MAKERS.items() if "functional" not in name])
def test_wanda_is_the_norm_of_what_a_weight_is_multiplied_with(maker: str) -> None:
    torch.manual_seed(1)
    model, batches, losses, _ = MAKERS[maker]()
    weights = prunable_parameters(model)
    scores = compute_wanda_importance(model, batches)
    assert scoring.error(scores, scoring.wanda(model, weights, batches, losses)) < TOLERANCE


def test_wanda_names_the_weights_it_cannot_see() -> None:
    model = scoring.Functional()
    with pytest.raises(ScoreError, match=r"attention\.out_proj\.weight"):
        compute_wanda_importance(model, scoring.token_pairs())


def test_hybrid_ranks_share_their_mean_place_where_scores_are_equal() -> None:
    torch.manual_seed(0)
    model, batches = scoring.mlp(), scoring.pairs(7)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.mul(8).round())  # many ties, zeros among them
    factors = {"magnitude": 0.3, "fisher": 1.0}
    parts = [(0.3, compute_magnitude_importance(model)), (1.0, compute_fisher_importance(model, batches))]
    expected = {name: torch.zeros(score.shape, dtype=torch.float64) for name, score in parts[0][1].items()}
    for factor, scores in parts:
        for name, ranks in scoring.ranks(scores).items():
            expected[name] += factor * ranks
    hybrid = compute_hybrid_importance(model, iter(batches), factors)
    assert scoring.error(hybrid, expected) < 1e-6


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60), st.integers(1, 3))
def test_ranks_by_counting_are_ranks_by_comparing(values: list[float], slots: int) -> None:
    scores = {"a": torch.tensor(values[: len(values) // 2]), "b": torch.tensor(values[len(values) // 2 :])}
    into = {name: torch.zeros(score.shape) for name, score in scores.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lottery_tickets.gradients._ranks._SLOTS", slots)
        add_ranks(scores, 2.0, into)
    for name, ranks in scoring.ranks(scores).items():
        assert into[name].double() == pytest.approx(2 * ranks, rel=1e-6)


# ---------------------------------------------------------------- what counts


def test_a_sample_without_labels_counts_for_nothing() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = scoring.mlp(), scoring.pairs(7, sizes=(6,))[0]
    targets[[0, 3]] = -100
    scores, stats = compute_gradient_importance(model, (inputs, targets), "fisher", return_stats=True)
    kept = targets != -100
    expected = compute_fisher_importance(model, (inputs[kept], targets[kept]))
    assert stats["num_samples"] == 4
    assert scoring.error(scores, _double(expected)) < TOLERANCE
    with pytest.raises(ScoreError, match="No sample has a label"):
        compute_fisher_importance(model, (inputs, torch.full_like(targets, -100)))
