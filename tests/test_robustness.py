"""The robustness curve against pruning copies of the model one by one."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from lottery_tickets import compute_pruning_robustness, create_magnitude_mask, errors
from lottery_tickets.robustness import SparsityLevel, _metrics

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


@pytest.fixture(scope="module")
def trained(mnist):
    """LeNet-300-100 after two passes over 4,000 digits, and two batches it has not seen."""
    images, digits = mnist
    order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    images, digits = images[order], digits[order]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 1.2e-3)
    for _ in range(2):
        for inputs, targets in zip(images[:4000].split(60), digits[:4000].split(60), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    batches = [(images[4000:4700], digits[4000:4700]), (images[4700:], digits[4700:])]
    return model, batches


def loss_of(model, batches):
    with torch.no_grad():
        losses = [F.cross_entropy(model(inputs), targets, reduction="none") for inputs, targets in batches]
    return torch.cat(losses).double().mean().item()


def pruned_copy(model, sparsity):
    pruned = copy.deepcopy(model)
    layers = [(layer, "weight") for layer in pruned if isinstance(layer, nn.Linear)]
    numel = sum(layer.weight.numel() for layer, _ in layers)
    prune.global_unstructured(layers, prune.L1Unstructured, amount=round(sparsity * numel))
    return pruned


def test_each_level_has_the_loss_of_a_pruned_copy(trained):
    model, batches = trained
    found = compute_pruning_robustness(model, batches)
    baseline = loss_of(model, batches)
    assert found["baseline_loss"] == pytest.approx(baseline, rel=1e-6)
    assert list(found["sparsity_curves"]) == [f"sparsity_{round(100 * level)}" for level in LEVELS]
    for level in found["sparsity_curves"].values():
        expected = loss_of(pruned_copy(model, level["sparsity"]), batches)
        assert level["loss"] == pytest.approx(expected, rel=1e-5)
        assert level["loss_increase"] == pytest.approx(expected - baseline, abs=1e-5)
        assert level["performance_retention"] == pytest.approx(baseline / expected, rel=1e-5)
        assert abs(level["actual_sparsity"] - level["sparsity"]) < 1e-5
    assert found["sparsity_curves"]["sparsity_90"]["loss"] > found["sparsity_curves"]["sparsity_50"]["loss"]


def test_sorting_gives_the_same_curve(trained):
    model, batches = trained
    assert compute_pruning_robustness(model, batches) == compute_pruning_robustness(
        model, batches, use_histogram_quantiles=False
    )


def test_masks_are_those_of_create_magnitude_mask(trained):
    model, batches = trained
    found = compute_pruning_robustness(model, batches, (0.5, 0.995), return_masks=True)
    assert found["masks"] == {
        "sparsity_50": create_magnitude_mask(model, 0.5),
        "sparsity_99.5": create_magnitude_mask(model, 0.995),
    }
    assert "masks" not in compute_pruning_robustness(model, batches, (0.5,))


def test_one_batch_a_loader_and_a_generator_say_the_same(trained):
    model, batches = trained
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    found = [
        compute_pruning_robustness(model, batch)["sparsity_curves"]["sparsity_90"]["loss"]
        for batch in (whole, batches, iter(batches))
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_the_model_comes_back_as_it_was(trained):
    model, batches = trained
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())

    def failing(_logits, _targets):
        raise KeyboardInterrupt

    compute_pruning_robustness(model, batches)
    with pytest.raises(KeyboardInterrupt):
        compute_pruning_robustness(model, batches, loss_fn=failing)
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_language_model(smollm2, smollm2_tokenizer, english_text):
    tokens = smollm2_tokenizer(english_text[2_000_000:2_001_000], return_tensors="pt")["input_ids"][:, :96]
    found = compute_pruning_robustness(smollm2, {"input_ids": tokens}, (0.2, 0.6))
    with torch.no_grad():
        expected = smollm2(input_ids=tokens, labels=tokens).loss.item()
    assert found["baseline_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["sparsity_curves"]["sparsity_60"]["loss"] > expected
    assert found["robustness_metrics"]["critical_sparsity"] in (0.2, 0.6)


points = st.lists(st.tuples(st.floats(0.01, 0.99), st.floats(0, 2)), min_size=1, unique_by=lambda point: point[0])


@given(points)
def test_metrics_are_what_the_docstring_says(drawn):
    curve = [
        SparsityLevel(sparsity=s, actual_sparsity=s, loss=1.0, loss_increase=0.0, performance_retention=r)
        for s, r in drawn
    ]
    found = _metrics(curve)
    sparsities, retentions = np.array(sorted(drawn)).T
    assert found["winning_ticket_score"] == pytest.approx(np.average(retentions, weights=sparsities))
    area = np.trapezoid([1, *retentions], [0, *sparsities]) / sparsities[-1]
    assert found["area_under_curve"] == pytest.approx(area)
    assert found["optimal_sparsity"] == sparsities[np.argmax(sparsities * retentions)]
    below = sparsities[retentions < 0.9]
    assert found["critical_sparsity"] == (below[0] if below.size else None)


def test_a_network_that_loses_nothing_scores_one():
    model = nn.Linear(4, 2, bias=False)
    nn.init.zeros_(model.weight)
    metrics = compute_pruning_robustness(model, (torch.eye(4), torch.zeros(4, dtype=torch.int64)), (0, 0.5))[
        "robustness_metrics"
    ]
    assert metrics == {
        "winning_ticket_score": 1.0,
        "critical_sparsity": None,
        "optimal_sparsity": 0.5,
        "area_under_curve": 1.0,
    }


def test_retention_without_a_loss():
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    level = compute_pruning_robustness(model, (torch.ones(1, 1), torch.ones(1, 1)), (0.0,))["sparsity_curves"]
    assert level["sparsity_0"]["performance_retention"] == 1.0


@pytest.mark.parametrize(
    ("levels", "loss_fn", "error", "message"),
    [
        ((), None, errors.SparsityError, "sparsity_levels is empty"),
        ((0.5, 1.0), None, errors.SparsityError, r"got 1\.0"),
        ((0.5,), lambda logits, _: -logits.square().mean(), errors.EvaluationError, "dense model is -"),
        ((0.5,), lambda logits, _: logits.mean() * math.nan, errors.EvaluationError, "dense model is nan"),
        (
            (0.95,),
            lambda logits, _: logits.square().mean() if logits.count_nonzero() > 64 else logits.mean() * math.inf,
            errors.EvaluationError,
            r"sparsity 0\.95 is (-?inf|nan)",
        ),
    ],
)
def test_bad_input(levels, loss_fn, error, message):
    torch.manual_seed(0)
    model, batch = nn.Linear(8, 8, bias=False), (torch.randn(16, 8), torch.zeros(16, dtype=torch.int64))
    with pytest.raises(error, match=message):
        compute_pruning_robustness(model, batch, levels, loss_fn=loss_fn)


def test_nothing_to_measure():
    with pytest.raises(errors.EvaluationError, match="no batches came"):
        compute_pruning_robustness(nn.Linear(2, 2), [])
    with pytest.raises(errors.BatchError, match="Expected a batch or an iterable of batches"):
        compute_pruning_robustness(nn.Linear(2, 2), 3)
