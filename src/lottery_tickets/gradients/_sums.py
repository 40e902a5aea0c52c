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
from lottery_tickets.masks import Shard

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
        self._count(name, gradient)
        for statistic, tensors in self.tensors.items():
            if statistic != "absolute":
                with tensors.use(name) as total:
                    _add(statistic, gradient.to(total.device), total)
        if "absolute" in self.tensors:
            with self.tensors["absolute"].use(name) as total:
                total.add_(gradient.abs_().to(total.device))

    def finished(self, _name: str) -> None:
        """Nothing is left to do at the end of a pass."""

    def _count(self, name: str, gradient: torch.Tensor, summands: int = 1) -> None:
        """One more gradient, which stands for so many summands."""
        if self._summary is not None:
            self.moments[name].add(self._summary(name, gradient))
        before, self._steps[name] = self._steps[name], self._steps[name] + summands
        if before <= _MOST_IN_FLOAT32 < self._steps[name]:
            self._widen()

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


class SumsInParts(Sums):
    """Sums of whole gradients over ranks, of which each keeps those of its own weights.

    A pass's gradients of one parameter are added up as they are made; then the ranks hand each other their sums,
    part by part. So beside the parts there are two tensors as large as the largest whole one.

    Args:
        like: This rank's parts of parameters by name.
        statistic: Which sum.
        store: See `Tensors`.
        summary: See `Sums`; it is given whole gradients.
        ranks: All that hold parts.
        shards: Name to the parts of all ranks, in their order.
    """

    def __init__(
        self,
        like: Mapping[str, torch.Tensor],
        statistic: Statistic,
        store: Store,
        summary: Callable[[str, torch.Tensor], float] | None,
        ranks: Ranks,
        shards: Mapping[str, Sequence[Shard]],
    ) -> None:
        super().__init__(like, [statistic], store, summary)
        self._statistic, self._shards = statistic, shards
        self._together = ranks
        self._scratch: torch.Tensor | None = None
        self._begun: str | None = None

    def receive(self, name: str, _sample: int, gradient: torch.Tensor) -> None:
        """Add one whole gradient, float32; what it holds is spent afterwards."""
        self._count(name, gradient, self._together.size)
        if self._statistic == "absolute":
            gradient.abs_()
        for row, shard in zip(self._rows(name), self._shards[name], strict=True):
            total = row[: shard.part.numel()].view(shard.part)
            _add(self._statistic, shard.take(gradient), total)

    def finished(self, name: str) -> None:
        """Add what all ranks have of this rank's part; all of them come here, with gradients or without."""
        mine = self._together.share_out(self._rows(name), name)
        self._begun = None
        with self.tensors[self._statistic].use(name) as total:
            total.add_(mine[: total.numel()].view(total.shape).to(total.device))

    def _rows(self, name: str) -> torch.Tensor:
        """The sums of this pass so far, a row for each rank's part."""
        longest = max(shard.part.numel() for shard in self._shards[name])
        size = self._together.size * longest
        if self._scratch is None or self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.float32, device=self._like[name].device)
        rows = self._scratch[:size].view(self._together.size, longest)
        if self._begun != name:
            self._begun = name
            rows.zero_()
        return rows


def _add(statistic: Statistic, gradient: torch.Tensor, total: torch.Tensor) -> None:
    """Add what a gradient, or the magnitude of one, gives to the sum."""
    if statistic == "square":
        total.addcmul_(gradient, gradient)
    else:
        total.add_(gradient)


def check_finite(name: str, score: torch.Tensor) -> None:
    """Raise ScoreError for a score that is not a number."""
    if score.numel():
        low, high = (float(one) for one in score.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ScoreError(
                f"{name}: scores reach {low} ... {high}, which float32 does not hold: gradients are too large. "
                "Scale the loss down (loss_fn), or set gradient_clip."
            )
