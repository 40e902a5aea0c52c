"""Gradients summed over ranks, one after another, in an order that all ranks keep."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import TrainingError
from lottery_tickets.training._weights import is_half

Receive = Callable[[int, torch.Tensor], None]


class Turns:
    """The gradients of one backward pass on their way to the optimizer, by way of all ranks.

    Which parameters take part in the loss may differ between ranks, and so may the order in which a backward pass
    makes gradients. So what each rank will have is agreed on beforehand, and sums are made in the reverse order of
    the parameters, about that of a backward pass: a gradient that comes before its turn waits for it, and a rank
    that has none adds zeros. Sums are in float32 at least, in memory of their own.

    Args:
        ranks: Who adds.
        named: Name and parameter, the same on all ranks.
        mine: Positions of those that will get a gradient here.
        receive: Takes each position and the sum, on every rank in the same order.
    """

    def __init__(
        self, ranks: Ranks, named: Sequence[tuple[str, nn.Parameter]], mine: Collection[int], receive: Receive
    ) -> None:
        there = np.zeros(len(named), np.int64)
        there[list(mine)] = 1
        there = ranks.sum(there)
        self._left = deque(index for index in reversed(range(len(named))) if there[index])
        self._coming = set(mine)
        self._waiting: dict[int, torch.Tensor] = {}
        self._ranks, self._named, self._receive = ranks, named, receive

    def take(self, index: int, gradient: torch.Tensor) -> None:
        """One gradient, which is not written to."""
        if index not in self._coming:
            raise TrainingError(
                f"{self._named[index][0]} gets a gradient that the loss's graph does not show, as under reentrant "
                "checkpointing, and ranks cannot agree on it; checkpoint with use_reentrant=False."
            )
        self._waiting[index] = gradient
        self._go_on()

    def finish(self) -> None:
        """What was announced and did not come is zero."""
        self._coming.clear()
        self._go_on()

    def _go_on(self) -> None:
        while self._left and (self._left[0] in self._waiting or self._left[0] not in self._coming):
            index = self._left.popleft()
            total = self._own(index)
            self._ranks.add_up(total)
            self._coming.discard(index)
            self._receive(index, total)

    def _own(self, index: int) -> torch.Tensor:
        gradient, parameter = self._waiting.pop(index, None), self._named[index][1]
        dtype = torch.float32 if is_half(parameter) else parameter.dtype
        if gradient is None:
            return torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        return gradient.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
