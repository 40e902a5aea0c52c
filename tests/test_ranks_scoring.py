"""Scores and quality over ranks: every rank learns what one would that saw all batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lottery_tickets import (
    compute_early_bird_tickets,
    compute_lottery_ticket_qualities,
    compute_lottery_ticket_quality,
    compute_ticket_overlap,
    create_importance_mask,
    create_magnitude_mask,
    importance_scoring,
)
from lottery_tickets.errors import DistributedError, EvaluationError, ScoreError
from lottery_tickets.gradients import _sums
from lottery_tickets.training import SharedBatches
from oracles import bytes_of

CRITERIA: dict[str, dict[str, Any]] = {
    "gradient_norm": {},
    "taylor": {},
    "taylor squared": {"order": "squared"},
    "fisher": {},
    "fisher batch": {"kind": "batch"},
    "fisher chunks": {"chunk_size": 100},
    "fisher disk": {"store": "disk"},
    "fisher clipped": {"gradient_clip": 0.5},
    "obd": {},
    "snip": {},
    "grasp": {},
    "wanda": {},
    "hybrid": {"weights": {"magnitude": 1.0, "fisher": 0.5, "wanda": 0.25}},
}
# Batches of each rank, by number of ranks: unequal, some of them none.
SHARES = {2: [[0, 1, 2, 4], [3]], 4: [[0], [], [1, 2, 3], [4]]}


class Net(nn.Module):
    """A convolution, a linear layer that a sample may not reach, and one that all reach."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.often = nn.Linear(4 * 16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.often(torch.relu(self.conv(inputs)).flatten(1))))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (4, 3, 5, 1, 4)
    return [
        (torch.randn(size, 1, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in sizes
    ]


def scores(criterion: str, data: Any, group: dist.ProcessGroup | None) -> dict[str, torch.Tensor]:
    compute = getattr(importance_scoring, f"compute_{criterion.split(maxsplit=1)[0]}_importance")
    return compute(Net(), data, **CRITERIA[criterion], num_samples=None, process_group=group)


def scored(rank: int, criterion: str, size: int) -> dict[str, torch.Tensor]:
    return scores(criterion, [batches()[number] for number in SHARES[size][rank]], dist.group.WORLD)


CASES = [
    *(
        pytest.param(criterion, 2, marks=pytest.mark.slow if criterion == "hybrid" else ())
        for criterion in CRITERIA
    ),
    *((criterion, 4) for criterion in ("fisher", "taylor", "wanda")),
]


@pytest.mark.parametrize(("criterion", "size"), CASES)
def test_scores_over_ranks_are_those_of_one_process(ranks, criterion, size):
    alone = scores(criterion, batches(), None)
    found = ranks(size).run(scored, criterion, size)
    for name, expected in alone.items():
        assert all(bytes_of(one[name]) == bytes_of(found[0][name]) for one in found)
        torch.testing.assert_close(found[0][name], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    first = create_importance_mask(found[0], 0.5)
    assert all(create_importance_mask(one, 0.5) == first for one in found)


def with_statistics(rank: int, folder: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    own = [batches()[number] for number in SHARES[2][rank]]
    found, stats = importance_scoring.compute_gradient_importance(
        Net(),
        own,
        "taylor",
        return_stats=True,
        store=folder / "scores.safetensors",
        process_group=dist.group.WORLD,
    )
    return stats, {name: one.clone() for name, one in found.items()}


def test_statistics_are_over_the_samples_of_all_ranks(ranks, tmp_path):
    alone, expected = importance_scoring.compute_gradient_importance(Net(), batches(), "taylor", return_stats=True)
    for stats, found in ranks(2).run(with_statistics, tmp_path):
        assert stats["num_samples"] == expected["num_samples"] == 17
        assert stats["mean_scores"] == pytest.approx(expected["mean_scores"], rel=1e-5)
        assert stats["standard_errors"] == pytest.approx(expected["standard_errors"], rel=1e-4)
        for name, one in alone.items():
            torch.testing.assert_close(found[name], one, rtol=1e-5, atol=1e-7)
    assert [path.name for path in tmp_path.iterdir()] == ["scores.safetensors"], "one file, that of rank 0"


def beyond_float32(rank: int) -> dict[str, torch.Tensor]:
    _sums._MOST_IN_FLOAT32 = 6
    try:
        return scored(rank, "fisher", 2)
    finally:
        _sums._MOST_IN_FLOAT32 = 10_000


def test_a_rank_whose_sums_are_wider_than_anothers(ranks):
    alone = scores("fisher", batches(), None)
    for found in ranks(2).run(beyond_float32):
        for name, expected in alone.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-9)


# --- Quality ---


def masks() -> dict[str, Any]:
    return dict(zip(["half", "most"], create_magnitude_mask(Net(), [0.5, 0.8]), strict=True))


def judged(rank: int, size: int) -> Any:
    own = [batches()[number] for number in SHARES[size][rank]]
    return compute_lottery_ticket_qualities(Net(), masks(), own, process_group=dist.group.WORLD)


def _numbers(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {key: one for part in value for key, one in _numbers(value[part], f"{name}.{part}").items()}
    if isinstance(value, tuple):
        return {f"{name}.{place}": one for place, one in enumerate(value)}
    return {name: value} if isinstance(value, (int, float)) else {}


@pytest.mark.parametrize("size", SHARES)
def test_quality_over_ranks_is_that_of_one_process(ranks, size):
    alone = _numbers(compute_lottery_ticket_qualities(Net(), masks(), batches()))
    first, *others = ranks(size).run(judged, size)
    assert all(other == first for other in others)
    assert _numbers(first) == pytest.approx(alone, rel=1e-9)
    assert first["half"]["num_batches_evaluated"] == 5
    assert first["half"]["loss_interval"] is not None


def wrapped(rank: int) -> Any:
    model = nn.parallel.DistributedDataParallel(Net())
    own = [batches()[number] for number in SHARES[2][rank]]
    mask = create_magnitude_mask(Net(), 0.5)
    return compute_lottery_ticket_quality(model, mask, own), importance_scoring.compute_fisher_importance(
        model, own
    )


def test_a_model_in_distributed_data_parallel_brings_its_group(ranks):
    alone = compute_lottery_ticket_quality(Net(), create_magnitude_mask(Net(), 0.5), batches())
    fisher = importance_scoring.compute_fisher_importance(Net(), batches())
    for quality, found in ranks(2).run(wrapped):
        assert _numbers(quality) == pytest.approx(_numbers(alone), rel=1e-9)
        assert found.keys() == fisher.keys()
        for name, one in fisher.items():
            torch.testing.assert_close(found[name], one, rtol=1e-5, atol=1e-9)


class Wary(Net):
    """Would not be called for nothing."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        assert len(inputs)
        return super().forward(inputs)


def in_shares(rank: int) -> Any:
    own, mask, group = (
        SharedBatches(batches(), dist.group.WORLD),
        create_magnitude_mask(Net(), 0.5),
        dist.group.WORLD,
    )
    quality = compute_lottery_ticket_quality(Wary(), mask, own, process_group=group)
    fisher = importance_scoring.compute_fisher_importance(Wary(), own, process_group=group)
    wanda = importance_scoring.compute_wanda_importance(Wary(), own, process_group=group)
    return quality["loss"], quality["num_samples"], fisher, wanda


def test_shares_of_fewer_samples_than_ranks(ranks):
    alone = compute_lottery_ticket_quality(Net(), create_magnitude_mask(Net(), 0.5), batches())
    fisher = importance_scoring.compute_fisher_importance(Net(), batches())
    wanda = importance_scoring.compute_wanda_importance(Net(), batches())
    for loss, samples, *found in ranks(4).run(in_shares):
        assert (loss, samples) == (pytest.approx(alone["loss"], rel=1e-6), 17)
        for scores, expected in zip(found, (fisher, wanda), strict=True):
            for name, one in expected.items():
                torch.testing.assert_close(scores[name], one, rtol=1e-5, atol=1e-9)


# --- Failing together ---


def failing(rank: int, how: str) -> None:
    data, mask, group = batches()[:2], create_magnitude_mask(Net(), 0.5), dist.group.WORLD
    if how == "nothing":
        importance_scoring.compute_fisher_importance(Net(), [], process_group=group)
    if how == "nothing to judge":
        compute_lottery_ticket_quality(Net(), mask, [], process_group=group)
    if rank == 1:
        data[1][0][0] = torch.nan
    if how == "masks":
        mask = create_magnitude_mask(Net(), 0.5 + 0.1 * rank)
    if how == "score":
        importance_scoring.compute_fisher_importance(Net(), data, process_group=group)
    compute_lottery_ticket_quality(Net(), mask, data, process_group=group)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("nothing", ScoreError, "No sample"),
        ("nothing to judge", EvaluationError, "gave no batches"),
        ("score", ScoreError, "Batch 1, sample 0"),
        ("quality", EvaluationError, "Batch 1: the loss of the dense model is nan"),
        ("masks", DistributedError, "Ranks 0 and 1 draw different masks"),
    ],
)
def test_what_one_rank_cannot_measure_is_an_error_on_all(ranks, how, kind, words):
    for answer in ranks(2).attempt(failing, how):
        assert type(answer) is kind
        assert words in str(answer)


# --- A language model ---


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1000, (2, 12), generator=generator)} for _ in range(2)]


def of_a_language_model(rank: int, folder: Path) -> dict[str, Any]:
    from lottery_tickets.large_models import load_model

    model, group = load_model(folder, torch.float32, progress=False), dist.group.WORLD
    scores = importance_scoring.compute_wanda_importance(model, [texts()[rank]], process_group=group)
    sums = {name: float(one.sum(dtype=torch.float64)) for name, one in scores.items()}
    digest = create_importance_mask(scores, 0.5, scope="row").digest()
    del scores
    shares = SharedBatches(texts(), group)
    options = {"learning_rate": 0.01, "max_epochs": 1, "progress": False, "check_every_steps": 2}
    found = compute_early_bird_tickets(model, shares, process_group=group, **options)
    return {"sums": sums, "digest": digest, "ticket": found["final_mask"], "loss": found["training"]["mean_loss"]}


@pytest.mark.slow
def test_a_language_model_is_scored_and_trained_as_on_one_process(ranks, smollm2, smollm2_folder):
    wanda = importance_scoring.compute_wanda_importance(smollm2, texts())
    options = {"learning_rate": 0.01, "max_epochs": 1, "progress": False, "check_every_steps": 2}
    alone = compute_early_bird_tickets(smollm2, texts(), **options)
    with ranks.own(2) as own:  # its memory is given back
        first, second = own.run(of_a_language_model, smollm2_folder)
    assert first == second
    assert first["sums"] == pytest.approx(
        {name: float(one.sum(dtype=torch.float64)) for name, one in wanda.items()}, rel=1e-5
    )
    assert first["loss"] == pytest.approx(alone["training"]["mean_loss"], rel=1e-5)
    overlap = compute_ticket_overlap(first["ticket"], alone["final_mask"])
    assert overlap["overall_overlap"] > 0.9999
