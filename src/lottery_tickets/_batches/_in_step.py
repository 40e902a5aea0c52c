"""Batches of ranks whose passes through a model are passes of all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lottery_tickets._batches._calls import samples_of
from lottery_tickets._ranks import Ranks


def in_step(batches: Iterable[Any], ranks: Ranks) -> Iterator[tuple[Any, bool]]:
    """Batches, as many on each rank as the one has that has most, and whether they count.

    Ranks that have no more go on with their last one, and it does not count again. One that never had any is lent
    a sample of another's. All ranks make this call.
    """
    waiting, last = iter(batches), None
    while True:
        batch = next(waiting, None)
        last = batch if batch is not None else last
        there = ranks.gather((batch is not None, last is not None))
        if not any(more for more, _ in there):
            return
        if not all(ever for _, ever in there):
            lender = next(rank for rank, (more, _) in enumerate(there) if more)
            lent = ranks.gather(samples_of(batch, 0, 1) if ranks.rank == lender else None)[lender]
            last = last if last is not None else lent
        yield last, batch is not None
