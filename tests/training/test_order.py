"""The order of the data hangs on seed and epoch alone, and can be entered anywhere."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lottery_tickets.errors import BatchError, TrainingError
from lottery_tickets.runs import RandomState, private_random_state
from lottery_tickets.training._order import DataOrder

NUMBERS = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20))


class Noisy(Dataset):
    """Every sample draws from all global streams, as augmentations do."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        noise = torch.tensor([random.random(), np.random.rand(), torch.rand(1).item()])
        return noise + index, torch.tensor(index)


class Streamed(IterableDataset):
    def __iter__(self):
        for index in torch.randperm(20):
            yield index.float()[None], index


LOADERS = {
    "in order": lambda: DataLoader(NUMBERS, 3),
    "shuffled": lambda: DataLoader(NUMBERS, 3, shuffle=True),
    "generator of its own": lambda: DataLoader(NUMBERS, 3, shuffle=True, generator=torch.Generator()),
    "sampler's generator": lambda: DataLoader(
        NUMBERS, 3, sampler=RandomSampler(NUMBERS, generator=torch.Generator())
    ),
    "batch sampler": lambda: DataLoader(NUMBERS, batch_sampler=BatchSampler(RandomSampler(NUMBERS), 3, False)),
    "generator deep inside": lambda: DataLoader(
        NUMBERS, batch_sampler=BatchSampler(RandomSampler(NUMBERS, generator=torch.Generator()), 3, False)
    ),
    "with replacement": lambda: DataLoader(
        NUMBERS, 3, sampler=RandomSampler(NUMBERS, replacement=True, num_samples=64, generator=torch.Generator())
    ),
    "weighted": lambda: DataLoader(NUMBERS, 3, sampler=WeightedRandomSampler([1.0] * 19 + [9.0], 20)),
    "distributed": lambda: DataLoader(NUMBERS, 3, sampler=DistributedSampler(NUMBERS, 2, 0)),
    "augmented": lambda: DataLoader(Noisy(), 3, shuffle=True),
    "streamed": lambda: DataLoader(Streamed(), 3),
    "workers": lambda: DataLoader(Noisy(), 3, shuffle=True, num_workers=1),
}


def labels(batches) -> list[list[float]]:
    return [torch.cat([inputs.flatten(), targets]).tolist() for inputs, targets in batches]


def trained(order: DataOrder, epoch: int, count: int | None = None, **options) -> list[list[float]]:
    """Batches, with draws between them as dropout makes them."""
    seen = []
    for batch in order.epoch(epoch, **options):
        seen += labels([batch])
        torch.rand(3)
        random.random()
        if len(seen) == count:
            break
    return seen


@pytest.fixture(autouse=True)
def quiet():
    with private_random_state():
        yield


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
def test_an_epoch_does_not_hang_on_what_came_before(make):
    order = DataOrder(make(), 7)
    first, second = trained(order, 0), trained(order, 1)
    torch.rand(5)
    other = DataOrder(make(), 7)
    assert trained(other, 1) == second
    assert trained(other, 0) == first
    if make is not LOADERS["in order"]:
        assert first != second
        assert trained(DataOrder(make(), 8), 0) != first or make is LOADERS["distributed"]


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize("count", [1, 4])
def test_an_epoch_can_be_entered_anywhere(make, count):
    whole = trained(DataOrder(make(), 7), 2)
    order = DataOrder(make(), 7)
    assert trained(order, 2, count) == whole[:count]
    state = RandomState.now()
    torch.manual_seed(0)
    assert trained(DataOrder(make(), 7), 2, skip=count, then=state) == whole[count:]


def test_the_end_of_an_epoch_can_be_entered_too():
    order = DataOrder(LOADERS["shuffled"](), 7)
    assert trained(order, 0, skip=7, then=RandomState.now()) == []


def test_length_where_it_is_known():
    assert DataOrder(LOADERS["shuffled"](), 0).length == 7
    assert DataOrder([(torch.ones(2, 1), torch.ones(2))], 0).length == 1
    assert DataOrder((torch.ones(2, 1), torch.ones(2)), 0).length == 1
    assert DataOrder(iter([1]), 0).length is None
    assert DataOrder(LOADERS["streamed"](), 0).length is None


def test_what_gives_no_batches_is_told():
    once = iter([(torch.ones(2, 1), torch.ones(2))])
    order = DataOrder(once, 0)
    assert len(list(order.epoch(0))) == 1
    with pytest.raises(
        TrainingError, match=r"no batches in epoch 2\. One that can be iterated only once is spent"
    ):
        list(order.epoch(1))
    with pytest.raises(TrainingError, match="no batches in epoch 1"):
        list(DataOrder([], 0).epoch(0))
    with pytest.raises(TrainingError, match="ended after 7 batches of epoch 3; the run to go on with had seen 9"):
        list(DataOrder(LOADERS["in order"](), 0).epoch(2, skip=9))
    with pytest.raises(BatchError):
        DataOrder(3, 0)
