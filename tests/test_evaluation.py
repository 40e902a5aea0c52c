"""Ticket quality against plain slow loops, and the model that comes back as it was."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lottery_tickets import (
    Mask,
    compute_lottery_ticket_qualities,
    compute_lottery_ticket_quality,
    create_magnitude_mask,
)
from lottery_tickets._statistics import ratio_interval
from lottery_tickets.errors import BatchError, EvaluationError, MaskAppliedError, MaskMismatchError
from lottery_tickets.masks import applied

Pair = tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def images_and_digits(mnist: Pair) -> Pair:
    """MNIST in a random order; the file has the digits sorted."""
    order = torch.randperm(len(mnist[1]), generator=torch.Generator().manual_seed(0))
    return mnist[0][order], mnist[1][order]


@pytest.fixture(scope="module")
def trained(images_and_digits: Pair) -> nn.Module:
    """A small classifier of digits, a few steps into its training, with modes and flags of all kinds."""
    images, digits = images_and_digits
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(1152, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for start in range(0, 3000, 100):
        optimizer.zero_grad()
        F.cross_entropy(model(images[start : start + 100]), digits[start : start + 100]).backward()
        optimizer.step()
    model[1].eval()
    model[1].weight.requires_grad_(False)
    return model


@pytest.fixture
def batches(images_and_digits: Pair) -> list[Pair]:
    """1,130 unseen digits in batches of 200; the last has 130."""
    images, digits = images_and_digits
    return list(zip(images[3000:4130].split(200), digits[3000:4130].split(200), strict=True))


def pruned_copy(model: nn.Module, mask: Mask) -> nn.Module:
    """The oracle's ticket: a copy with its weights multiplied."""
    twin = copy.deepcopy(model).eval()
    parameters = dict(twin.named_parameters())
    for name, kept in mask.items():
        parameters[name].data *= kept
    return twin


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything that evaluation must leave alone, weights as bytes."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()},
        {name: id(tensor) for name, tensor in tensors.items()},
        {name: (tensor.requires_grad, tensor._version, tensor.grad is None) for name, tensor in tensors.items()},
        {
            name: (module.training, type(module), len(module._forward_hooks))
            for name, module in model.named_modules()
        },
        torch.get_rng_state().numpy().tobytes(),
        torch.is_grad_enabled(),
    )


# ---------------------------------------------------------------- the numbers


def test_a_classifier_against_the_plain_loop(trained: nn.Module, batches: list[Pair]) -> None:
    mask = create_magnitude_mask(trained, 0.9)
    quality = compute_lottery_ticket_quality(trained, mask, batches)
    images, digits = (torch.cat(parts) for parts in zip(*batches, strict=True))
    for model, result in ((pruned_copy(trained, mask), quality), (trained, quality["baseline"])):
        with torch.no_grad():
            logits = copy.deepcopy(model).eval()(images)
        assert result["loss"] == pytest.approx(float(F.cross_entropy(logits, digits)), rel=1e-5)
        assert result["accuracy"] == float((logits.argmax(-1) == digits).double().mean())
        assert result["perplexity"] is None
        assert result["perplexity_interval"] is None
    accuracies = quality["accuracy"], quality["baseline"]["accuracy"]
    assert 0.3 < accuracies[0] < accuracies[1]  # the comparison is of a ticket that lost something
    assert quality["retention_metric"] == "accuracy"
    assert quality["performance_retention"] == accuracies[0] / accuracies[1]
    assert quality["quality_score"] == mask.sparsity * quality["performance_retention"]
    assert quality["sparsity"] == mask.sparsity
    counts = [quality[f"num_{what}"] for what in ("batches_evaluated", "batches_skipped", "samples", "units")]
    assert counts == [6, 0, 1130, 1130]
    json.dumps(quality)


def test_a_language_model_against_the_plain_loop(
    smollm2: nn.Module, smollm2_tokenizer: Any, english_text: str
) -> None:
    tokens = smollm2_tokenizer(english_text[2_000_000:2_000_600], return_tensors="pt")["input_ids"]
    windows = [{"input_ids": window} for window in tokens[:, :100].split([48, 40, 12], dim=1)]
    mask = create_magnitude_mask(smollm2, 0.3)
    qualities = compute_lottery_ticket_qualities(
        smollm2, {"magnitude": mask, "all": Mask.ones_like(smollm2)}, windows
    )
    quality = qualities["magnitude"]
    twin = pruned_copy(smollm2, mask)
    for model, result in ((twin, quality), (smollm2, quality["baseline"]), (smollm2, qualities["all"])):
        with torch.no_grad():
            losses = [model(**window, labels=window["input_ids"]).loss.item() for window in windows]
        loss = np.average(losses, weights=[47, 39, 11])
        assert result["loss"] == pytest.approx(loss, rel=1e-5)
        assert result["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert result["accuracy"] is None
        assert result["perplexity_interval"] == tuple(map(math.exp, result["loss_interval"]))
    assert quality["num_units"] == 97
    assert quality["retention_metric"] == "loss"
    assert quality["performance_retention"] == quality["baseline"]["loss"] / quality["loss"]
    kept = quality["baseline"]["perplexity"] / quality["perplexity"]
    assert quality["quality_score"] == pytest.approx(quality["sparsity"] * kept)
    assert qualities["all"]["performance_retention"] == 1.0
    assert qualities["all"]["retention_interval"] == pytest.approx((1.0, 1.0))


def test_bfloat16_and_a_single_batch(trained: nn.Module, batches: list[Pair]) -> None:
    model = copy.deepcopy(trained).bfloat16()
    mask = create_magnitude_mask(model, 0.5)
    quality = compute_lottery_ticket_quality(
        model=model, mask=mask, dataloader=[batches[0]], precision_mode="high"
    )
    with torch.no_grad():
        logits = pruned_copy(model, mask)(batches[0][0].bfloat16())
    assert quality["loss"] == pytest.approx(float(F.cross_entropy(logits.float(), batches[0][1])), rel=1e-6)
    assert quality["retention_interval"] is quality["loss_interval"] is None
    assert compute_lottery_ticket_quality(model, mask, batches[0]) == quality
    fast = compute_lottery_ticket_quality(model, mask, batches[0], precision_mode="fast")
    assert fast["loss"] == pytest.approx(quality["loss"], rel=1e-2)
    assert fast["loss"] != quality["loss"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_regression_has_a_loss_alone() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 2)
    batches = [(torch.randn(rows, 6), torch.randn(rows, 2)) for rows in (5, 3)]
    mask = create_magnitude_mask(model, 0.5)
    quality = compute_lottery_ticket_quality(model, mask, batches)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    losses = [float(F.mse_loss(one(x), y).detach()) for one in (model, pruned_copy(model, mask))]
    assert quality["performance_retention"] == pytest.approx(losses[0] / losses[1])
    assert (quality["accuracy"], quality["perplexity"], quality["num_units"]) == (None, None, 16)


def test_each_batch_is_loaded_once_and_tickets_share_the_baseline(trained: nn.Module, batches: list[Pair]) -> None:
    masks = dict(zip(("half", "most"), create_magnitude_mask(trained, [0.5, 0.95]), strict=True))
    loaded = []

    def loader() -> Iterator[Pair]:
        for number, batch in enumerate(batches):
            loaded.append(number)
            yield batch

    together = compute_lottery_ticket_qualities(trained, masks, loader(), max_batches=4)
    assert loaded == [0, 1, 2, 3]
    for name, mask in masks.items():
        plain = dict(mask.items())
        assert compute_lottery_ticket_quality(trained, plain, batches, max_batches=4) == together[name]
    assert together["half"]["baseline"] == together["most"]["baseline"]


def test_a_loss_of_the_users_own(trained: nn.Module, batches: list[Pair]) -> None:
    def wrong(logits: torch.Tensor, digits: torch.Tensor) -> torch.Tensor:
        return (logits.argmax(-1) != digits).float()

    mask = create_magnitude_mask(trained, 0.9)
    quality = compute_lottery_ticket_quality(trained, mask, batches, loss_fn=wrong)
    known = compute_lottery_ticket_quality(trained, mask, batches)
    assert quality["loss"] == pytest.approx(1 - known["accuracy"])
    assert quality["accuracy"] is None
    assert quality["retention_metric"] == "loss"
    negative = compute_lottery_ticket_quality(
        trained, mask, batches, loss_fn=lambda logits, digits: -wrong(logits, digits) - 1
    )
    without = [negative[key] for key in ("performance_retention", "retention_interval", "quality_score")]
    assert without == [None, None, None]


# ---------------------------------------------------------------- intervals


def test_the_interval_of_equal_batches_is_students() -> None:
    values = [2.0, 3.5, 1.0, 4.0]
    expected = stats.t.interval(0.9, 3, loc=np.mean(values), scale=stats.sem(values))
    assert ratio_interval([10 * value for value in values], [10.0] * 4, 0.9) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0.1, 100), st.floats(0.1, 100)), min_size=2, max_size=8), st.floats(0.5, 0.99))
def test_the_interval_is_the_ratio_estimators(pairs: list[tuple[float, float]], confidence: float) -> None:
    x, y = (np.array(values, np.longdouble) for values in zip(*pairs, strict=True))
    ratio = x.sum() / y.sum()
    variance = len(x) / y.sum() ** 2 * ((x - ratio * y) ** 2).sum() / (len(x) - 1)
    half = stats.t.ppf((1 + confidence) / 2, len(x) - 1) * float(np.sqrt(variance))
    low, high = ratio_interval(list(map(float, x)), list(map(float, y)), confidence)
    assert (low, high) == pytest.approx((float(ratio) - half, float(ratio) + half), rel=1e-6, abs=1e-9)


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(4000):
        dense = generator.normal(3.0, 0.3, 5)
        ticket = dense * 1.25 + generator.normal(0, 0.05, 5)
        low, high = ratio_interval(list(dense), list(ticket), 0.95)
        covered += low < 0.8 < high
    assert 0.935 < covered / 4000 < 0.965


def test_no_interval_from_one_batch() -> None:
    assert ratio_interval([1.0], [2.0], 0.95) is None
    assert ratio_interval([], [], 0.95) is None


def test_pairing_narrows_the_retention(trained: nn.Module, batches: list[Pair]) -> None:
    # What makes a batch hard is hard for both sides, and cancels.
    mask = create_magnitude_mask(trained, 0.6)
    paired = compute_lottery_ticket_quality(trained, mask, batches, loss_fn=F.cross_entropy)
    alone = compute_lottery_ticket_quality(
        trained, mask, batches, paired["baseline"]["loss"], loss_fn=F.cross_entropy
    )
    assert alone["performance_retention"] == pytest.approx(paired["performance_retention"])
    widths = [quality["retention_interval"][1] - quality["retention_interval"][0] for quality in (paired, alone)]
    assert widths[0] < widths[1]


# ---------------------------------------------------------------- a baseline known beforehand


def test_a_known_baseline_is_not_measured(trained: nn.Module, batches: list[Pair]) -> None:
    mask = create_magnitude_mask(trained, 0.9)
    measured = compute_lottery_ticket_quality(trained, mask, batches)
    calls = []
    hook = trained.register_forward_hook(lambda *_: calls.append(1))
    given = [
        measured["baseline"],
        {"accuracy": measured["baseline"]["accuracy"]},
        measured["baseline"]["accuracy"],
    ]
    for baseline in given:
        known = compute_lottery_ticket_quality(trained, mask, batches, baseline)
        assert known["performance_retention"] == measured["performance_retention"]
        assert known["retention_metric"] == "accuracy"
    assert len(calls) == len(batches) * len(given)
    by_loss = compute_lottery_ticket_quality(trained, mask, batches, {"loss": measured["baseline"]["loss"]})
    hook.remove()
    assert by_loss["retention_metric"] == "loss"
    assert by_loss["performance_retention"] == measured["baseline"]["loss"] / measured["loss"]
    assert by_loss["baseline"]["accuracy"] is None


@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        ("0.9", "baseline_performance is a finite number, or a mapping with 'loss' or 'accuracy'"),
        (True, "got True"),
        (math.nan, "got nan"),
        ({}, "neither 'loss' nor 'accuracy'"),
        ({"f1": 0.3}, r"its keys are \['f1'\]"),
        ({"loss": math.inf}, r"baseline_performance\['loss'\] is a finite number"),
        (1.7, r"it is the dense accuracy, in \[0, 1\]; got 1.7. A dense loss is given as {'loss': ...}"),
        ({"accuracy": -0.1}, "got -0.1"),
    ],
)
def test_baselines_that_are_refused(trained: nn.Module, batches: list[Pair], baseline: Any, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        compute_lottery_ticket_quality(trained, Mask.ones_like(trained), batches[:1], baseline)


def test_an_accuracy_for_a_model_that_has_none() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(EvaluationError, match="has only an accuracy, but these batches have only a loss"):
        compute_lottery_ticket_quality(
            model, Mask.ones_like(model), [(torch.ones(1, 2), torch.ones(1, 1))], {"accuracy": 0.5}
        )


# ---------------------------------------------------------------- losses that are not finite


@pytest.fixture
def overflowing() -> tuple[nn.Module, Mask, list[Pair]]:
    """Batch 1 spoils the ticket alone, batch 3 both."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -1.0]])
    mask = Mask.from_tensors({"weight": torch.tensor([[True, False]])})
    inputs = [[1.0, 1.0], [1e30, 1e30], [2.0, 1.0], [math.inf, 0.0]]
    return model, mask, [(torch.tensor([row]), torch.tensor([[3.0]])) for row in inputs]


def test_non_finite_losses_are_refused_by_name(overflowing: tuple[nn.Module, Mask, list[Pair]]) -> None:
    model, mask, batches = overflowing
    with pytest.raises(EvaluationError, match=r"Batch 1: the loss of ticket 'mask' is inf\. nonfinite='skip'"):
        compute_lottery_ticket_quality(model, mask, batches)
    with pytest.raises(EvaluationError, match="Batch 0: the loss of the dense model is inf"):
        compute_lottery_ticket_quality(model, mask, batches[3:])
    with pytest.raises(EvaluationError, match="Batch 0: the loss of ticket 'a' is inf"):
        compute_lottery_ticket_qualities(model, {"a": mask}, batches[1:])


def test_non_finite_losses_are_left_out_on_both_sides(overflowing: tuple[nn.Module, Mask, list[Pair]]) -> None:
    model, mask, batches = overflowing
    quality = compute_lottery_ticket_quality(model, mask, batches, nonfinite="skip")
    assert (quality["num_batches_evaluated"], quality["num_batches_skipped"], quality["num_samples"]) == (2, 2, 2)
    assert quality["loss"] == (4.0 + 1.0) / 2
    assert quality["baseline"]["loss"] == (9.0 + 4.0) / 2
    with pytest.raises(EvaluationError, match="no batch has a finite loss"):
        compute_lottery_ticket_quality(model, mask, batches[1::2], nonfinite="skip")
    several = compute_lottery_ticket_qualities(
        model, {"a": mask, "b": Mask.ones_like(model)}, batches, nonfinite="skip"
    )
    assert several["a"] == quality
    assert several["b"]["num_batches_evaluated"] == 3


# ---------------------------------------------------------------- bad arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_batches": 0}, "max_batches is a positive integer or None for all, got 0"),
        ({"max_batches": -1}, "got -1"),
        ({"max_batches": 1.5}, "got 1.5"),
        ({"max_batches": True}, "got True"),
        ({"confidence": 1.0}, "confidence is a probability between 0 and 1, got 1.0"),
        ({"confidence": 0}, "got 0"),
        ({"nonfinite": "ignore"}, "nonfinite is 'raise' or 'skip', got 'ignore'"),
        ({"precision_mode": "double"}, "precision_mode is 'high'"),
        ({"dataloader": []}, "The dataloader gave no batches"),
        ({"dataloader": iter(())}, "may be spent already"),
    ],
)
def test_arguments_that_are_refused(
    trained: nn.Module, batches: list[Pair], arguments: dict[str, Any], message: str
) -> None:
    arguments = {"dataloader": batches[:1], **arguments}
    with pytest.raises(EvaluationError, match=message):
        compute_lottery_ticket_quality(trained, Mask.ones_like(trained), **arguments)


def test_other_refusals(trained: nn.Module, batches: list[Pair]) -> None:
    with pytest.raises(EvaluationError, match="masks is empty"):
        compute_lottery_ticket_qualities(trained, {}, batches)
    with pytest.raises(MaskMismatchError, match="the model has no such parameter"):
        compute_lottery_ticket_quality(trained, {"nowhere": torch.ones(1)}, batches)
    with pytest.raises(BatchError, match="got str"):
        compute_lottery_ticket_quality(trained, Mask.ones_like(trained), ["images"])
    with pytest.raises(BatchError, match="Expected a batch or an iterable of batches, got NoneType"):
        compute_lottery_ticket_quality(trained, Mask.ones_like(trained), None)
    ignored = [(batches[0][0], torch.full_like(batches[0][1], -100))]
    with pytest.raises(EvaluationError, match="every label is ignored"):
        compute_lottery_ticket_quality(trained, Mask.ones_like(trained), ignored)
    with applied(trained, Mask.ones_like(trained)), pytest.raises(MaskAppliedError):
        compute_lottery_ticket_quality(trained, Mask.ones_like(trained), batches)


# ---------------------------------------------------------------- the model comes back


def test_the_model_is_as_it_was(trained: nn.Module, images_and_digits: Pair) -> None:
    images, digits = images_and_digits
    loader = DataLoader(TensorDataset(images[:500], digits[:500]), batch_size=100, shuffle=True)
    before = state_of(trained)
    assert trained.training
    compute_lottery_ticket_quality(trained, create_magnitude_mask(trained, 0.8), loader)
    assert state_of(trained) == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["loader", "forward", "loss_fn"])
def test_the_model_is_as_it_was_after_an_exception(
    trained: nn.Module, batches: list[Pair], failure: type[BaseException], where: str
) -> None:
    mask = create_magnitude_mask(trained, 0.8)
    calls = []

    def failing(*_: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 4:  # in the second batch, while the mask is applied
            raise failure("inside")
        return torch.zeros(())

    def loader() -> Iterator[Pair]:
        yield batches[0]
        raise failure("inside")

    def interrupt(*_: Any) -> None:
        if where == "forward":
            failing()

    hook = trained.register_forward_pre_hook(interrupt)
    before = state_of(trained)
    with pytest.raises(failure, match="inside"):
        compute_lottery_ticket_quality(
            trained,
            mask,
            loader() if where == "loader" else batches,
            loss_fn=failing if where == "loss_fn" else None,
        )
    after = state_of(trained)
    hook.remove()
    assert after == before


def test_a_short_run_prints_nothing(
    trained: nn.Module, batches: list[Pair], capfd: pytest.CaptureFixture[str]
) -> None:
    compute_lottery_ticket_quality(trained, Mask.ones_like(trained), batches)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_a_long_run_shows_a_bar_unless_told_not_to(
    trained: nn.Module,
    batches: list[Pair],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    progress: bool,
) -> None:
    from tqdm import tqdm

    def eager(*arguments: Any, delay: float, **options: Any) -> Any:
        assert delay == 2
        return tqdm(*arguments, **options)

    monkeypatch.setattr("lottery_tickets.evaluation.tqdm", eager)
    mask = Mask.ones_like(trained)
    compute_lottery_ticket_quality(trained, mask, batches, max_batches=5, progress=progress)
    shown = capfd.readouterr().err
    assert ("evaluating" in shown and "10/10" in shown) == progress
    assert bool(shown) == progress


MEMORY = """
import torch
from pathlib import Path
from lottery_tickets import Mask, compute_lottery_ticket_quality

SIDE, LAYERS = 2048, 12
model = torch.nn.Sequential(*(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
batch = torch.randn(4, SIDE), torch.zeros(4, dtype=torch.long)
small = torch.nn.Linear(4, 4)
# Imports and compiles what the first call of a process brings with it.
compute_lottery_ticket_quality(small, Mask.ones_like(small), [(torch.ones(1, 4), torch.ones(1, 4))])
with torch.no_grad():
    model(batch[0])
mask = Mask.ones_like(model)

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

Path("/proc/self/clear_refs").write_text("5")
before = resident("VmHWM")
compute_lottery_ticket_quality(model, mask, [batch, batch])
print(resident("VmHWM") - before, SIDE * SIDE * 4, SIDE * SIDE * 4 * LAYERS)
"""


def test_memory_is_a_layer_not_the_model() -> None:
    source = str(Path(__file__).parents[1] / "src")
    program = f"import sys; sys.path.insert(0, {source!r})\n{MEMORY}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    extra, layer, model = map(int, done.stdout.split())
    assert extra < 2 * layer + (16 << 20)
    assert model > 4 * extra  # so that a copy of the model would be seen


# ---------------------------------------------------------------- where a ratio has no meaning


def test_retention_without_a_dense_accuracy_is_none(trained: nn.Module, batches: list[Pair]) -> None:
    with torch.no_grad():
        wrong = (copy.deepcopy(trained).eval()(batches[0][0]).argmax(-1) + 1) % 10
    quality = compute_lottery_ticket_quality(
        trained, create_magnitude_mask(trained, 0.5), [(batches[0][0], wrong)]
    )
    assert quality["baseline"]["accuracy"] == 0.0
    assert quality["retention_metric"] == "accuracy"
    assert quality["performance_retention"] is quality["quality_score"] is None


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    class Certain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.scale.weight, 1e4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale(F.one_hot(x, 5).float()[..., None])[..., 0]

    tokens = torch.tensor([[0, 1, 2]])
    model = Certain()
    quality = compute_lottery_ticket_quality(model, Mask.ones_like(model), [(tokens, (tokens + 1) % 5)])
    assert quality["loss"] == pytest.approx(1e4)
    assert quality["perplexity"] == quality["baseline"]["perplexity"] == math.inf
    assert quality["performance_retention"] == 1.0
