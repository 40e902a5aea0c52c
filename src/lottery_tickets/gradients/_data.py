"""The samples that scores are means over: the same ones in every pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from lottery_tickets._batches import batches_of, samples_of, size_of
from lottery_tickets.errors import ScoreError


class Samples:
    """The first `limit` samples of a dataloader, as often as they are asked for.

    A dataloader that shuffles gives the same samples in every pass: torch's random state is set before each. One
    that can be gone through only once is kept in memory, unless a single pass is all that is wanted.

    Args:
        dataloader: Batches in any of the usual forms, or one batch.
        limit: How many samples; None for all.
        seed: Of torch's random state.
        passes: How often they will be gone through.
        may_be_none: Whether there may be no samples at all: other ranks may have some.
    """

    def __init__(
        self, dataloader: Any, limit: int | None, *, seed: int, passes: int, may_be_none: bool = False
    ) -> None:
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise ScoreError(f"num_samples is a positive integer or None for all, got {limit!r}.")
        self._limit, self._seed, self._may_be_none = limit, seed, may_be_none
        self._batches: Iterable[Any] = batches_of(dataloader)
        if passes > 1 and iter(self._batches) is self._batches:
            self._batches = list(self)

    def __iter__(self) -> Iterator[Any]:
        torch.manual_seed(self._seed)
        left, came = self._limit, False
        for batch in self._batches:
            came = True
            size = size_of(batch)
            if not size and self._may_be_none:  # a share of fewer samples than ranks
                continue
            if left is not None and size > left:
                yield samples_of(batch, 0, left)
            else:
                yield batch
            if left is not None:
                left -= size
                if left <= 0:
                    return
        if not came and not self._may_be_none:
            raise ScoreError(
                "The dataloader gave no batches; one that can be gone through only once may be spent already."
            )
