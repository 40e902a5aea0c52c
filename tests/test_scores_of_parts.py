"""Scores of models that lie in parts on the ranks (FSDP2): those of the whole model, each rank with its part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lottery_tickets import ShardedMask, compute_ticket_overlap, create_importance_mask, importance_scoring
from lottery_tickets.errors import DistributedError, ScoreError
from lottery_tickets.gradients import _ranks, _sums
from lottery_tickets.planning._shapes import Shapes
from lottery_tickets.training import SharedBatches

CRITERIA: dict[str, dict[str, Any]] = {
    "gradient_norm": {},
    "taylor": {},
    "taylor squared": {"order": "squared"},
    "fisher": {},
    "fisher batch": {"kind": "batch"},
    "fisher chunks": {"chunk_size": 100},
    "fisher disk": {"store": "disk"},
    "fisher clipped": {"gradient_clip": 0.5},
    "fisher of biases": {"include": "*.bias"},
    "taylor of one loss": {"loss_fn": nn.functional.cross_entropy},
    "taylor of blocks": {"checkpoint_activations": True},
    "obd": {},
    "snip": {},
    "snip of biases": {"include": "*.bias"},
    "wanda": {},
    "magnitude": {},
}
# Batches of each rank, by number of ranks: unequal, some of them none.
SHARES = {1: [[0, 1, 2, 3, 4]], 2: [[0, 1, 2, 4], [3]], 4: [[0], [], [1, 2, 3], [4]]}


class Net(nn.Module):
    """Grouped and transposed convolutions, a list of blocks, tied weights, and rows that no rank count divides."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 3, 2)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(75, 9), nn.Tanh(), nn.Linear(9, 75)) for _ in range(2))
        self.blocks[1][0].weight = self.blocks[0][0].weight
        self.head = nn.Linear(75, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.up(torch.relu(self.conv(inputs)))).flatten(1)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


def in_parts(model: nn.Module, **options: Any) -> nn.Module:
    if isinstance(model, Net):
        fully_shard(model.conv, **options)
        fully_shard([*model.blocks], **options)  # in one group, for their tied weights
    return fully_shard(model, **options)


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of which one has no label, and another a sample without one."""
    generator = torch.Generator().manual_seed(1)
    found = [
        (torch.randn(size, 2, 6, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for size in (4, 3, 5, 1, 4)
    ]
    found[4][1][:] = -100
    found[0][1][1] = -100
    return found


def scores(model: nn.Module, criterion: str, data: Any, **options: Any) -> dict[str, torch.Tensor]:
    compute = getattr(importance_scoring, f"compute_{criterion.split(maxsplit=1)[0]}_importance")
    if criterion == "magnitude":
        return compute(model)
    return compute(model, data, **CRITERIA[criterion], num_samples=None, progress=False, **options)


def scored(rank: int, criterion: str, size: int) -> dict[str, torch.Tensor]:
    model = in_parts(Net())
    model.head.weight.requires_grad_(False)
    before = {name: (one, one.requires_grad) for name, one in model.named_parameters()}
    found = scores(model, criterion, [batches()[number] for number in SHARES[size][rank]])
    for name, one in found.items():
        parameter = before[name][0]
        assert (one.placements, one.device_mesh, one.shape) == (
            *(parameter.placements, parameter.device_mesh, parameter.shape),
        )
        assert one.to_local().shape == parameter.to_local().shape
    for name, one in model.named_parameters():
        assert (one, one.requires_grad, one.grad) == (*before[name], None)
    mask = create_importance_mask(found, 0.5, model=model, include=CRITERIA[criterion].get("include"))
    assert isinstance(mask, ShardedMask)
    whole = {name: one.full_tensor() for name, one in found.items()}
    assert mask.digest() == create_importance_mask(whole, 0.5).digest()
    return whole


CASES = [
    *((criterion, 2) for criterion in CRITERIA),
    *((criterion, 4) for criterion in ("fisher", "taylor", "wanda")),
]


@pytest.mark.parametrize(("criterion", "size"), [*CASES, ("fisher of biases", 1)])
def test_scores_of_a_model_in_parts_are_those_of_the_whole_one(ranks, criterion, size):
    alone = scores(Net(), criterion, batches())
    for found in ranks(size).run(scored, criterion, size):
        assert_near(found, alone)


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], rtol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        torch.testing.assert_close(found[name], one, rtol=rtol, atol=rtol / 10 * float(one.abs().max()))


def gathered(found: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: one.full_tensor() for name, one in found.items()}


# --- Other models, other shards ---


class Rows(nn.Module):
    """A layer whose input holds all samples in one row, which shows where there are several."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(36, 5, bias=False), nn.Linear(10, 3, bias=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        hidden = self.first(inputs.reshape(1, -1, 36)).relu()
        return self.last(hidden.reshape(len(inputs), 10))


class Dropping(nn.Module):
    """A layer that batches go through once more, for nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(72, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if len(inputs) > 1:
            self.layer(inputs.flatten(1))
        return self.layer(inputs.flatten(1))


def of_other_shards(rank: int) -> list[dict[str, torch.Tensor]]:
    own = [batches()[number] for number in SHARES[2][rank]]

    def along_columns(parameter: nn.Parameter) -> Any:
        from torch.distributed.tensor import Shard

        return Shard(1) if parameter.dim() > 1 and parameter.shape[1] % 2 == 0 else None

    columns = in_parts(Net(), shard_placement_fn=along_columns, reshard_after_forward=False)
    narrow = in_parts(Net(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    rows = in_parts(Rows())
    half, dropping = in_parts(Net().bfloat16()), in_parts(Dropping())
    found = [(columns, "fisher"), (columns, "wanda"), (rows, "fisher"), (narrow, "taylor"), (half, "taylor")]
    found.append((dropping, "obd"))
    return [gathered(scores(model, criterion, own)) for model, criterion in found]


def test_other_shards_and_types_and_layers_that_mix_samples(ranks):
    half = scores(Net().bfloat16(), "taylor", batches())
    expected = [
        *((scores(Net(), "fisher", batches()), 1e-5), (scores(Net(), "wanda", batches()), 1e-5)),
        (scores(Rows(), "fisher", batches()), 1e-5),
        *((half, 0.05), (half, 1e-5)),
        (scores(Dropping(), "obd", batches()), 1e-5),
    ]
    for answer in ranks(2).run(of_other_shards):
        for found, (one, tolerance) in zip(answer, expected, strict=True):
            assert_near(found, one, tolerance)


# --- Shares, statistics, files ---


def in_shares(rank: int, folder: Path) -> Any:
    model = in_parts(Net())
    own = SharedBatches(batches(), dist.group.WORLD)
    kept, stats = importance_scoring.compute_gradient_importance(
        model, own, "taylor", return_stats=True, store=folder / "taylor.safetensors", progress=False
    )
    wanda = importance_scoring.compute_wanda_importance(model, own, store=folder / "wanda.safetensors")
    _sums._MOST_IN_FLOAT32 = 6
    try:
        wide = scores(model, "fisher", own)
    finally:
        _sums._MOST_IN_FLOAT32 = 10_000
    return stats, [gathered(one) for one in (kept, wanda, wide)]


def test_shares_of_fewer_samples_than_ranks_with_statistics_and_files(ranks, tmp_path):
    alone, expected = importance_scoring.compute_gradient_importance(Net(), batches(), "taylor", return_stats=True)
    wanda, fisher = scores(Net(), "wanda", batches()), scores(Net(), "fisher", batches())
    for stats, found in ranks(4).run(in_shares, tmp_path):
        assert stats["num_samples"] == expected["num_samples"] == 12
        for what in ("mean_scores", "standard_errors"):
            assert stats[what] == pytest.approx(expected[what], rel=1e-4)
        for one, whole in zip(found, (alone, wanda, fisher), strict=True):
            assert_near(one, whole)
    assert_near(load_file(tmp_path / "taylor.safetensors"), alone)
    assert_near(load_file(tmp_path / "wanda.safetensors"), wanda)
    assert len([*tmp_path.iterdir()]) == 2


def held(rank: int) -> tuple[int, int]:
    model = in_parts(Net())
    found = scores(model, "obd", batches()[:1], store="device")
    sizes = [one.to_local().untyped_storage().nbytes() for one in found.values()]
    return sum(sizes), 4 * Shapes.of_model(model).count


def test_a_rank_holds_its_part_and_no_more_and_plans_for_it(ranks):
    whole = sum(one.nbytes for one in scores(Net(), "obd", batches()[:1]).values())
    found = ranks(2).run(held)
    assert all(made == planned for made, planned in found)
    assert sum(made for made, _ in found) == whole


# --- Sums of ranks ---


def summed_ranks(rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    model = in_parts(coarse(Net()))
    own = [batches()[number] for number in SHARES[size][rank]]
    found = [importance_scoring.compute_hybrid_importance(model, own, {"magnitude": 0.7})]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(_ranks, "_SORTED", 50)  # so that few values are told at a time
        found.append(importance_scoring.compute_hybrid_importance(model, own, {"magnitude": 0.7}))
    found.append(importance_scoring.compute_hybrid_importance(model, own, {"magnitude": 1.0, "fisher": 0.5}))
    return [gathered(one) for one in found]


def coarse(model: nn.Module) -> nn.Module:
    """With many equal weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 64).round() / 64)
    return model


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_of_a_model_in_parts_are_among_all_its_weights(ranks, size):
    hybrid, model = importance_scoring.compute_hybrid_importance, coarse(Net())
    magnitudes, both = (
        hybrid(model, batches(), {"magnitude": 0.7}),
        hybrid(model, batches(), {"magnitude": 1.0, "fisher": 0.5}),
    )
    for whole, by_few, with_fisher in ranks(size).run(summed_ranks, size):
        for found in (whole, by_few):
            assert all(torch.equal(found[name], one) for name, one in magnitudes.items())
        # Scores that rounding has let change places are neighbours.
        assert all(float((with_fisher[name] - one).abs().max()) < 0.02 for name, one in both.items())


# --- What is refused, and failing together ---


def failing(rank: int, how: str) -> None:
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor, init_device_mesh

    data, model = batches()[:2], in_parts(Net())
    if how == "nan" and rank:
        data[1][0][0] = torch.nan
    if how == "nothing":
        data = []
    if how == "loss":

        def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            if rank and len(labels) == 3:
                raise KeyError("no such label")
            return nn.functional.cross_entropy(logits, labels, reduction="none")

        importance_scoring.compute_fisher_importance(model, data, loss_fn=loss_fn)
    if how == "statistics":
        options: dict[str, Any] = {"return_stats": True, "progress": False}
        importance_scoring.compute_taylor_importance(in_parts(Dropping()), data, **options)
    if how == "grasp":
        importance_scoring.compute_grasp_importance(model, data)
    if how == "synflow":
        importance_scoring.compute_synflow_importance(model, (2, 6, 6))
    if how == "tensors":
        mesh = init_device_mesh("cpu", (2,))

        def cut(_: str, module: nn.Module, on: Any) -> None:
            for name, one in module.named_parameters(recurse=False):
                part = distribute_tensor(one.detach(), on, [Shard(0)], src_data_rank=None)
                module.register_parameter(name, nn.Parameter(part))

        model = distribute_module(nn.Linear(4, 4), mesh, cut)
        importance_scoring.compute_wanda_importance(model, data)
    importance_scoring.compute_fisher_importance(model, data)


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("nan", ScoreError, "Batch 1, sample 0: the loss is nan"),
        ("statistics", ScoreError, "layer.weight is called in places that the loss does not depend on"),
        ("nothing", ScoreError, "No sample has a label that counts"),
        ("grasp", DistributedError, "GraSP, which differentiates twice, is for models that every rank has whole"),
        ("synflow", DistributedError, "SynFlow, whose flow is one of magnitudes in float64"),
        ("tensors", DistributedError, "weight is a DTensor that fully_shard has not made"),
    ],
)
def test_what_cannot_be_scored_in_parts_is_an_error_on_all(ranks, how, kind, words):
    for answer in ranks(2).attempt(failing, how):
        assert type(answer) is kind, answer
        assert words in str(answer)


def test_an_error_of_the_loss_on_one_rank_is_heard_by_all(ranks):
    first, second = ranks(2).attempt(failing, "loss")
    assert isinstance(second, KeyError)
    assert isinstance(first, DistributedError)
    assert str(first) == "rank 1 failed: KeyError: 'no such label'"


# --- A language model ---


def texts() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1000, (2, 12), generator=generator)} for _ in range(2)]


def summed(found: dict[str, Any]) -> dict[str, float]:
    local = {name: getattr(one, "to_local", lambda one=one: one)() for name, one in found.items()}
    return {name: float(one.sum(dtype=torch.float64)) for name, one in local.items()}


def of_a_language_model(rank: int, folder: str) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    wanda = importance_scoring.compute_wanda_importance(model, [texts()[rank]])
    mask = create_importance_mask(wanda, 0.5, model=model, scope="row").gathered()
    return summed(wanda), mask, summed(importance_scoring.compute_obd_importance(model, [texts()[rank]]))


@pytest.mark.slow
def test_a_language_model_in_parts_is_scored_as_the_whole_one(ranks, smollm2, smollm2_folder):
    wanda = importance_scoring.compute_wanda_importance(smollm2, texts())
    expected = create_importance_mask(wanda, 0.5, scope="row")
    obd = importance_scoring.compute_obd_importance(smollm2, texts())
    with ranks.own(2) as own:  # its memory is given back
        (wandas, mask, obds), (more_wandas, again, more_obds) = own.run(of_a_language_model, str(smollm2_folder))
    for whole, parts in ((wanda, (wandas, more_wandas)), (obd, (obds, more_obds))):
        found = {name: parts[0][name] + parts[1][name] for name in whole}
        assert found == pytest.approx(summed(whole), rel=1e-4)
    assert mask == again
    assert compute_ticket_overlap(mask, expected)["overall_overlap"] > 0.9999
