"""Callbacks in several processes: what the first finds, and models that are sharded over all."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from lottery_tickets import create_magnitude_mask
from lottery_tickets.errors import WeightsError
from lottery_tickets.integrations._holding import HoldingCallback
from lottery_tickets.integrations._ranks import is_first, told_by_first


def tell(rank: int) -> tuple[bool, Any]:
    def find() -> list[Any]:
        assert rank == 0, "the others do not look"
        return [True, 7]

    return is_first(), told_by_first(find)


def test_what_the_first_finds_is_told_to_all(ranks):
    assert ranks(2).run(tell) == [(True, [True, 7]), (False, [True, 7])]


def fail(rank: int) -> None:
    def find() -> None:
        raise WeightsError("the weights are bad")

    told_by_first(find)


def test_what_fails_in_the_first_fails_in_all(ranks):
    first, second = ranks(2).attempt(fail)
    for error in (first, second):
        assert isinstance(error, WeightsError)
        assert "the weights are bad" in str(error)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3))


def hold_sharded(rank: int) -> tuple[bool, bool]:
    """Whether the sharded network begins at the rewound ticket, and whether zeros stay, in whole tensors."""
    from torch.distributed.fsdp import fully_shard

    model = network()
    initial = copy.deepcopy(model.state_dict())
    mask = create_magnitude_mask(model, 0.6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    hold = HoldingCallback(mask, rewind_to=initial)
    hold._hold(model, rewind=True)

    def whole(name: str) -> torch.Tensor:
        return model.get_parameter(name).full_tensor()

    rewound = all(
        torch.equal(whole(name), torch.where(mask[name], weight, 0.0) if name in mask else weight)
        for name, weight in initial.items()
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    zero = []
    for step in range(3):
        generator = torch.Generator().manual_seed(2 * step + rank)
        optimizer.zero_grad()
        x, y = torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        zero += [not whole(name)[~mask[name]].any() and bool(whole(name)[mask[name]].all()) for name in mask]
    hold.close()
    return rewound, all(zero)


def test_a_ticket_is_rewound_and_held_in_a_model_that_fsdp2_shards(ranks):
    assert ranks(2).run(hold_sharded) == [(True, True), (True, True)]
