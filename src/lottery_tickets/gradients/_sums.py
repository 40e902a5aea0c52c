"""Sums over gradients: all that scores are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients._stores import Store, Tensors

Statistic = Literal["signed", "absolute", "square"]

# Up to here float32 sums are as good as the gradients they are sums of.
_MOST_IN_FLOAT32 = 10_000


@dataclass
class Moments:
    """Of one number a sample: how many, their sum and the sum of their squares."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """One more."""
        self.count += 1
        self.total += value
        self.squares += value * value

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.squares + other.squares)

    def standard_error(self) -> float:
        """Of the mean, `sqrt(variance / count)`; NaN for fewer than two."""
        if self.count < 2:
            return math.nan
        spread = max(0.0, self.squares - self.total * self.total / self.count)
        return math.sqrt(spread / (self.count - 1) / self.count)


class Sums:
    """Sums of gradients g, of |g| and of g^2, elementwise, one of each for each parameter.

    They add over batches, chunks and ranks. After 10,000 summands float64 takes over from float32.

    Args:
        like: Parameters by name.
        statistics: Which of the sums.
        store: See `Tensors`; a path holds the first of the statistics.
        summary: Function from a name and a gradient to the mean score that this gradient alone would give the
            parameter; its moments over the samples are kept.
        ranks: Those whose sums are added to these in the end.
    """

    def __init__(
        self,
        like: Mapping[str, torch.Tensor],
        statistics: Sequence[Statistic],
        store: Store,
        summary: Callable[[str, torch.Tensor], float] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._like, self._store = like, store
        self.tensors = {statistic: Tensors(like, store) for statistic in statistics}
        self.moments = {name: Moments() for name in like}
        self._summary = summary
        self._steps: dict[str, int] = dict.fromkeys(like, 0)

    def receive(self, name: str, _sample: int, gradient: torch.Tensor) -> None:
        """Add one gradient, float32; what it holds is spent afterwards."""
        if self._summary is not None:
            self.moments[name].add(self._summary(name, gradient))
        self._steps[name] += 1
        if self._steps[name] == _MOST_IN_FLOAT32 + 1:
            self._widen()
        for statistic, tensors in self.tensors.items():
            if statistic != "absolute":
                with tensors.use(name) as total:
                    here = gradient.to(total.device)
                    total.addcmul_(here, here) if statistic == "square" else total.add_(here)
        if "absolute" in self.tensors:
            with self.tensors["absolute"].use(name) as total:
                total.add_(gradient.abs_().to(total.device))

    def _widen(self) -> None:
        for statistic, tensors in self.tensors.items():
            if tensors.dtype == torch.float64:
                continue
            wide = Tensors(self._like, "disk" if not isinstance(self._store, str) else self._store, torch.float64)
            for name in self._like:
                with tensors.use(name) as narrow, wide.use(name) as total:
                    total.copy_(narrow)
            self.tensors[statistic] = wide

    def finish(
        self, statistic: Statistic, count: int, finish: Callable[[str, torch.Tensor], torch.Tensor | None]
    ) -> dict[str, torch.Tensor]:
        """Means in place of the sums of all ranks, and scores in place of the means.

        Args:
            statistic: Which sums.
            count: Summands on all ranks.
            finish: Function from a name and a float32 mean, which it may overwrite, to the score; None stands for
                what it left in the mean.

        Raises:
            ScoreError: A score that float32 does not hold.
        """
        if any(self._ranks.gather(self.tensors[statistic].dtype == torch.float64)):
            self._widen()
        sums = self.tensors.pop(statistic)
        scores = sums if sums.dtype == torch.float32 else Tensors(self._like, self._store)
        for name in self._like:
            with sums.use(name) as total, scores.use(name) as score:
                self._ranks.add_up(total)
                if scores is not sums:
                    score.copy_(total.div_(count))
                else:
                    score.div_(count)
                made = finish(name, score)
                if made is not None:
                    score.copy_(made)
                check_finite(name, score)
        return scores.all()


def check_finite(name: str, score: torch.Tensor) -> None:
    """Raise ScoreError for a score that is not a number."""
    if score.numel():
        low, high = (float(one) for one in score.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ScoreError(
                f"{name}: scores reach {low} ... {high}, which float32 does not hold: gradients are too large. "
                "Scale the loss down (loss_fn), or set gradient_clip."
            )
