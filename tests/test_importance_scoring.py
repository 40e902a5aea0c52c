"""Scores against a loop over single samples, and what they leave behind."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import scoring
from lottery_tickets import prunable_parameters
from lottery_tickets.errors import BatchError, ScoreError
from lottery_tickets.gradients import add_ranks
from lottery_tickets.gradients._synflow import synaptic_flow
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
from processes import PEAK, run_python

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
def test_ranks_by_counting_and_by_sorting_are_ranks_by_comparing(values: list[float], slots: int) -> None:
    scores = {"a": torch.tensor(values[: len(values) // 2]), "b": torch.tensor(values[len(values) // 2 :])}
    counted, sorted_ = ({name: torch.zeros(score.shape) for name, score in scores.items()} for _ in range(2))
    add_ranks(scores, 2.0, sorted_)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lottery_tickets.gradients._ranks._SORTED", -1)
        patch.setattr("lottery_tickets.gradients._ranks._SLOTS", slots)
        add_ranks(scores, 2.0, counted)
    for name, ranks in scoring.ranks(scores).items():
        assert counted[name].double() == pytest.approx(2 * ranks, rel=1e-6)
        assert torch.equal(counted[name], sorted_[name])


# ---------------------------------------------------------------- without data


@pytest.mark.parametrize(("maker", "shape"), [("mlp", (7,)), ("cnn", (3, 8, 8))])
def test_synflow_removes_in_the_order_of_the_paper(maker: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    model = MAKERS[maker]().model
    weights = prunable_parameters(model)
    before = _described(model)
    scores = compute_synflow_importance(model, shape, rounds=7, final_density=0.4)
    assert _described(model) == before
    rounds = scoring.synflow_masks(model, weights, shape, rounds=7, final_density=0.4)
    everything = torch.cat([score.flatten() for score in scores.values()])
    for turn, kept in enumerate(rounds, start=1):
        removed = len(everything) - int(kept.sum())
        assert abs(removed - len(everything) * (1 - 0.4 ** (turn / 7))) <= 1
        assert everything[kept].min() > everything[~kept].max()


def test_the_flow_of_a_llama_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    model = scoring.llama()
    weights = prunable_parameters(model)
    kept = {name: torch.rand(weight.shape) < 0.7 for name, weight in weights.items()}
    flow = synaptic_flow(model, weights, kept, None)
    assert scoring.error(flow, scoring.llama_flow(model, kept)) < TOLERANCE


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_flow_is_conserved(name: str) -> None:
    """What enters a chain of layers leaves it, and the factors of a product carry as much as the product."""
    torch.manual_seed(0)
    model = MAKERS[name]().model
    weights = prunable_parameters(model)
    kept = {key: torch.ones(weight.shape, dtype=torch.bool) for key, weight in weights.items()}
    sums = {key: float(one.double().sum()) for key, one in synaptic_flow(model, weights, kept, None).items()}
    if name == "gpt2":
        for layer in (f"transformer.h.{index}." for index in range(2)):
            # queries, keys and values
            assert sums[f"{layer}attn.c_attn.weight"] == pytest.approx(3 * sums[f"{layer}attn.c_proj.weight"])
            assert sums[f"{layer}mlp.c_fc.weight"] == pytest.approx(sums[f"{layer}mlp.c_proj.weight"])
        return
    for layer in (f"bert.encoder.layer.{index}." for index in range(2)):
        through = sums[f"{layer}attention.output.dense.weight"]
        for part in ("query", "key", "value"):
            assert sums[f"{layer}attention.self.{part}.weight"] == pytest.approx(through, rel=1e-5)
        assert sums[f"{layer}intermediate.dense.weight"] == pytest.approx(sums[f"{layer}output.dense.weight"])
    assert sums["bert.pooler.dense.weight"] == pytest.approx(1, rel=1e-5)
    assert sums["classifier.weight"] == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (nn.Linear(2, 2), {}, "input_shape"),
        (nn.Linear(2, 2), {"input_shape": (2,), "rounds": 0}, "rounds"),
        (nn.Linear(2, 2), {"input_shape": (2,), "final_density": 0.0}, "final_density"),
        (scoring.Functional(), {"input_shape": (3,)}, "MultiheadAttention"),
        (
            nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).apply(scoring.emptied),
            {"input_shape": (2,)},
            "The flow",
        ),
    ],
)
def test_synflow_names_what_it_cannot_follow(model: nn.Module, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        compute_synflow_importance(model, **options)


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


def test_num_samples_cuts_the_last_batch_and_a_shuffled_loader_gives_each_pass_the_same() -> None:
    torch.manual_seed(0)
    model, (inputs, targets) = scoring.mlp(), scoring.pairs(7, sizes=(20,))[0]
    expected = compute_fisher_importance(model, (inputs[:6], targets[:6]))
    scores, stats = compute_gradient_importance(
        model, [(inputs[:4], targets[:4]), (inputs[4:], targets[4:])], "fisher", num_samples=6, return_stats=True
    )
    assert stats["num_samples"] == 6
    assert scoring.error(scores, _double(expected)) < TOLERANCE
    data = torch.utils.data.TensorDataset(inputs, targets)
    shuffled: Any = torch.utils.data.DataLoader(data, batch_size=4, shuffle=True)
    options: dict[str, Any] = {"num_samples": 6, "seed": 3}
    whole = compute_fisher_importance(model, shuffled, **options)
    chunked = compute_fisher_importance(model, shuffled, chunk_size=70, **options)
    assert scoring.error(chunked, _double(whole)) < TOLERANCE
    other = compute_fisher_importance(model, shuffled, num_samples=6, seed=4)
    assert scoring.error(other, _double(whole)) > 0.01
    once = compute_fisher_importance(model, iter([(inputs, targets)]), chunk_size=70, num_samples=6)
    assert scoring.error(once, _double(expected)) < TOLERANCE


def test_standard_errors_are_those_of_the_mean_score_over_samples() -> None:
    torch.manual_seed(0)
    model, batches = scoring.mlp(), scoring.pairs(7)
    weights = prunable_parameters(model)
    samples = scoring.gradients(model, weights, batches, scoring.class_losses)
    _, stats = compute_gradient_importance(model, batches, "taylor", return_stats=True)
    for name, weight in weights.items():
        means = torch.stack([(weight.detach().double() * one[name]).abs().mean() for one in samples])
        assert stats["mean_scores"][name] == pytest.approx(float(means.mean()), rel=1e-5)
        assert stats["standard_errors"][name] == pytest.approx(float(means.std() / len(means) ** 0.5), rel=1e-5)
    _, stats = compute_gradient_importance(model, batches, "snip", return_stats=True)
    assert all(math.isnan(error) for error in stats["standard_errors"].values())


def test_labels_drawn_from_the_model_give_the_true_fisher() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, bias=False)
    inputs = torch.randn(2, 3)
    # E over y of (p - onehot(y))_c^2 = p_c (1 - p_c), for softmax p.
    p = model(inputs).softmax(-1).detach().double()
    expected = {"weight": (p * (1 - p)).T @ inputs.double() ** 2 / 2}
    batch = (inputs.repeat(4000, 1), torch.zeros(8000, dtype=torch.int64))
    scores = compute_fisher_importance(model, batch, kind="true", num_samples=None)
    assert scoring.error(scores, expected) < 0.05
    again = compute_fisher_importance(model, batch, kind="true", num_samples=None)
    assert torch.equal(scores["weight"], again["weight"])
    small = [(inputs, batch[1][:2])] * 30
    singly = [(inputs[[row]], batch[1][:1]) for _ in range(30) for row in range(2)]
    by_two = compute_fisher_importance(model, small, kind="true")
    assert scoring.error(compute_fisher_importance(model, singly, kind="true"), _double(by_two)) < TOLERANCE


def test_labels_drawn_for_numbers_are_normal_and_for_flags_yes_or_no() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False)
    inputs = torch.randn(2, 3).repeat(4000, 1)
    # L = (f - y)^2 with y of variance 1/2 around f: E of (2 (f - y) x)^2 = 2 x^2.
    expected = {"weight": 2 * (inputs.double() ** 2).mean(0, keepdim=True)}
    scores = compute_fisher_importance(model, (inputs, torch.zeros(8000, 1)), kind="true", num_samples=None)
    assert scoring.error(scores, expected) < 0.05
    own: Any = lambda logits, targets: (logits - targets).square().mean()  # noqa: E731
    with pytest.raises(ScoreError, match="kind='empirical'"):
        compute_fisher_importance(model, (inputs, torch.zeros(8000, 1)), kind="true", loss_fn=own)


def test_a_loss_that_is_one_number_a_batch_sends_samples_singly() -> None:
    torch.manual_seed(0)
    model, batches = scoring.mlp(), scoring.pairs(7)
    expected = compute_fisher_importance(model, batches)
    scores = compute_fisher_importance(model, batches, loss_fn=nn.functional.cross_entropy)
    assert scoring.error(scores, _double(expected)) < TOLERANCE
    with pytest.raises(BatchError, match="one loss for all samples"):
        compute_fisher_importance(model, batches, kind="batch", loss_fn=nn.functional.cross_entropy)


# ---------------------------------------------------------------- where sums lie


@pytest.mark.parametrize("beyond", [10_000, 3])
@pytest.mark.parametrize("store", ["cpu", "device", "disk", "path"])
def test_every_store_gives_the_same_bits(
    store: str, beyond: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lottery_tickets.gradients._sums._MOST_IN_FLOAT32", beyond)
    torch.manual_seed(0)
    model, batches = scoring.cnn(), scoring.pairs(3, 8, 8)
    expected = compute_taylor_importance(model, batches)
    path = tmp_path / "scores.safetensors"
    scores = compute_taylor_importance(model, batches, store=path if store == "path" else store)
    for name, score in scores.items():
        assert score.dtype == torch.float32
        assert torch.equal(score, expected[name])
    assert path.exists() == (store == "path")
    if store == "path":
        loaded = safetensors.torch.load_file(path)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_float64_takes_over_where_float32_would_lose_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.5)
    large, small = torch.ones(1, 1), torch.full((300, 1), 1e-4)
    batches = [(large, torch.zeros(1, 1)), (small, torch.zeros(300, 1))]
    exact = (1 + 300 * (1e-4**2) ** 2) / 301
    monkeypatch.setattr("lottery_tickets.gradients._sums._MOST_IN_FLOAT32", 1)
    # Each small square is below half of what float32 tells 1 and its neighbour apart by.
    wide = compute_fisher_importance(model, batches, num_samples=None)["weight"].item()
    assert wide == pytest.approx(exact, rel=1e-7)


def test_sums_on_disk_take_no_memory() -> None:
    code = (
        PEAK
        + """
import sys, torch
from pathlib import Path
from lottery_tickets.importance_scoring import compute_fisher_importance
model = torch.nn.Sequential(*(torch.nn.Linear(1500, 1500, bias=False) for _ in range(8)))
small = torch.nn.Linear(3, 3)
compute_fisher_importance(small, (torch.randn(2, 3), torch.zeros(2, 3)), store=sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
scores = compute_fisher_importance(model, (torch.randn(2, 1500), torch.zeros(2, 1500)), store=sys.argv[1])
print(peak() - before)
"""
    )
    weights = 8 * 1500 * 1500 * 4
    assert int(run_python(code, "cpu")) > weights
    assert int(run_python(code, "disk")) < weights // 2


# ---------------------------------------------------------------- what is refused


def test_overflow_names_the_tensor_and_a_loss_that_is_not_finite_its_sample() -> None:
    model = nn.Linear(2, 1, bias=False)
    huge: Any = lambda logits, targets: logits.mean(1) * 1e25  # noqa: E731
    with pytest.raises(ScoreError, match="weight: scores reach"):
        compute_fisher_importance(model, (torch.ones(2, 2), torch.ones(2, 1)), loss_fn=huge)
    inputs = torch.ones(3, 2)
    inputs[1, 0] = math.inf
    with pytest.raises(ScoreError, match="Batch 0, sample 1: the loss is"):
        compute_fisher_importance(model, (inputs, torch.ones(3, 1)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_type": "fish"}, "importance_type"),
        ({"num_samples": 0}, "num_samples"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"gradient_clip": 0.0}, "gradient_clip"),
        ({"store": "tape"}, "store"),
        ({"store": "disk", "chunk_size": 10}, "chunk_size"),
    ],
)
def test_arguments_out_of_range_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScoreError, match=message):
        compute_gradient_importance(scoring.mlp(), scoring.pairs(7), **options)
    with pytest.raises(ScoreError, match="no batches"):
        compute_gradient_importance(scoring.mlp(), [])


# ---------------------------------------------------------------- data types


@pytest.mark.parametrize("name", ["mlp", "cnn", "llama", "bert"])
def test_bfloat16_weights_are_summed_in_float32(name: str) -> None:
    """Each sample's gradient is a float32 product of the bfloat16 values that the model computed by itself."""
    torch.manual_seed(1)
    model, batches, losses, _ = MAKERS[name]()
    model.bfloat16()
    batches = [
        tuple(one.bfloat16() if one.is_floating_point() else one for one in batch)
        if isinstance(batch, tuple)
        else batch
        for batch in batches
    ]
    weights = prunable_parameters(model)
    samples = scoring.layer_gradients(model, weights, batches, losses)
    expected = {name: scoring.mean([one[name] ** 2 for one in samples]) for name in weights}
    singly = [scoring.row(batch, row) for batch in batches for row in range(scoring.rows(batch))]
    assert scoring.error(compute_fisher_importance(model, singly), expected) < TOLERANCE
    w = {name: weight.detach().double() for name, weight in weights.items()}
    mean = {name: scoring.mean([one[name] for one in samples]) for name in w}
    for scores, slow in (
        (
            compute_gradient_norm_importance(model, singly),
            {name: scoring.mean([one[name].abs() for one in samples]) for name in w},
        ),
        (
            compute_taylor_importance(model, singly),
            {name: scoring.mean([(w[name] * one[name]).abs() for one in samples]) for name in w},
        ),
        (compute_obd_importance(model, singly), {name: w[name] ** 2 * expected[name] / 2 for name in w}),
        (compute_snip_importance(model, singly), {name: (w[name] * mean[name]).abs() for name in w}),
    ):
        assert scoring.error(scores, slow) < TOLERANCE
    inputs = scoring.wanda(model, weights, singly, losses, wide=False)
    assert scoring.error(compute_wanda_importance(model, singly), inputs) < TOLERANCE
    # In batches bfloat16 rounds other sums.
    assert scoring.error(compute_fisher_importance(model, batches), expected) < 0.05
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["mlp", "cnn", "llama", "bert"])
def test_grasp_of_bfloat16_weights_is_computed_wide(name: str) -> None:
    torch.manual_seed(1)
    model, batches, losses, _ = MAKERS[name]()
    model.bfloat16()
    before = _described(model)
    weights = prunable_parameters(model)
    expected = scoring.grasp(model, weights, batches, losses)
    assert scoring.error(compute_grasp_importance(model, batches), expected) < TOLERANCE
    assert _described(model) == before
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
