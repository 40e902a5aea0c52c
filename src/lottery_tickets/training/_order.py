"""The order of the data in each epoch, whatever came before it, so that a killed run goes on as it would have."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from lottery_tickets._batches import batches_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.runs import RandomState, seed_everything
from lottery_tickets.training._sharing import SharedBatches

_END = object()


class DataOrder:
    """The batches of a dataloader, epoch by epoch, in an order that hangs on the seed and the epoch alone.

    Before an epoch is iterated, Python's, numpy's and torch's global random states are seeded, and with them the
    generators that the loader and its samplers have of their own; samplers with `set_epoch` are told the epoch.
    What the workers of a loader with `persistent_workers=True` draw hangs on the epochs before, all the same.

    Args:
        dataloader: Batches of any usual form, or one batch.
        seed: Non-negative integer.
        ranks: Processes that train together, each on batches of its own, of which all have as many; None for this
            process alone.
    """

    def __init__(self, dataloader: Any, seed: int, ranks: Ranks | None = None) -> None:
        self._batches = batches_of(dataloader)
        self._seed = seed
        self._ranks = ranks or Ranks()

    @property
    def length(self) -> int | None:
        """Batches an epoch, None where the loader does not say."""
        try:
            return len(self._batches)  # type: ignore[arg-type]
        except TypeError:
            return None

    def epoch(self, number: int, skip: int = 0, then: RandomState | None = None) -> Iterator[Any]:
        """Batches of an epoch, the first ones left out.

        Args:
            number: Of the epoch, from 0.
            skip: How many batches to read and drop.
            then: The random state to go on from after them.

        Raises:
            TrainingError: The loader gives no batch, fewer than are to be dropped, or another number than on
                another rank.
        """
        self.seed(number)
        batches = iter(self._batches)
        dropped = sum(1 for _ in islice(batches, skip))
        if dropped < skip:
            raise TrainingError(
                f"The dataloader ended after {dropped} batches of epoch {number + 1}; the run to go on with had "
                f"seen {skip}. Give it the data it was started with."
            )
        if then is not None and skip:
            then.restore()
        empty = not skip
        for batch in self._in_step(batches, number):
            empty = False
            yield batch
        if empty:
            raise TrainingError(
                f"The dataloader gave no batches in epoch {number + 1}. One that can be iterated only once is "
                "spent after the first: give a DataLoader or a list."
            )

    def _in_step(self, batches: Iterator[Any], number: int) -> Iterator[Any]:
        """The batches, of which each rank has the next if any has."""
        if self._ranks.size == 1:
            yield from batches
            return
        for count in itertools.count():
            batch = next(batches, _END)
            there = self._ranks.gather(batch is not _END)
            if not all(there):
                if any(there):
                    with_, without = there.index(True), there.index(False)
                    raise TrainingError(
                        f"Rank {without} has no more than {count} batches in epoch {number + 1}, and rank {with_} "
                        "has: ranks train together, so give each as many, a share of every batch for instance."
                    )
                return
            yield batch

    def seed(self, number: int) -> None:
        """Seed all that an epoch's order may hang on."""
        seed = seed_everything(self._seed, number)
        for one in _parts(self._batches):
            generator = getattr(one, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            if callable(set_epoch := getattr(one, "set_epoch", None)):
                set_epoch(number)


def _parts(loader: Any) -> Iterator[Any]:
    """The loader, its dataset and its samplers, those inside them included."""
    while isinstance(loader, SharedBatches):
        loader = loader.dataloader
    waiting, seen = [loader], set()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [getattr(one, name, None) for name in ("sampler", "batch_sampler")]
    dataset = getattr(loader, "dataset", None)
    if dataset is not None:
        yield dataset
