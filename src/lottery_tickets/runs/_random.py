"""Every random stream that training may draw from: Python's, numpy's, torch's on each device."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RandomState:
    """Where the streams stand.

    Attributes:
        python: Of `random`.
        numpy: Of numpy's global generator.
        torch: Of torch's generator on the CPU.
        cuda: Device index to the state of its generator.
    """

    python: tuple[Any, ...]
    numpy: tuple[Any, ...]
    torch: Tensor
    cuda: dict[int, Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """The present state."""
        name, keys, *rest = np.random.get_state(legacy=True)
        indices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        return cls(
            python=random.getstate(),
            numpy=(name, [int(key) for key in keys], *rest),
            torch=torch.get_rng_state(),
            cuda={index: torch.cuda.get_rng_state(index) for index in indices},
        )

    def restore(self) -> None:
        """Make it the present one."""
        version, words, gauss = self.python
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        for index, state in self.cuda.items():
            if index < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, index)


@contextmanager
def private_random_state() -> Iterator[None]:
    """Seeds and draws inside the block are not seen outside it."""
    before = RandomState.now()
    try:
        yield
    finally:
        before.restore()


def seed_everything(*parts: int) -> int:
    """Seed every stream from several numbers, of which any other combination gives other streams.

    Returns:
        The seed, for generators that stand apart.
    """
    words = np.random.SeedSequence(parts).generate_state(2, np.uint64)
    seed = int(words[0]) >> 1  # some generators take signed numbers only
    random.seed(seed)
    np.random.seed(int(words[1]) & 0xFFFFFFFF)
    torch.manual_seed(seed)
    return seed
