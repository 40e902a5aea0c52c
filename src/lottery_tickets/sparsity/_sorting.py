"""Selection the plain way: sort every weight. Same lines and bits, 20 bytes a weight and more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from lottery_tickets.errors import SparsityError
from lottery_tickets.masks import PackedBits, pack
from lottery_tickets.sparsity._blocks import Rescore, Weights, refuse_nan
from lottery_tickets.sparsity._selection import Line, NanPolicy


class Sorting:
    """Draws the same lines as `Selection` from one stable sort of all magnitudes.

    Args:
        tensors: As for `Selection`.
        rescore: As for `Selection`.
        dtype: As for `Selection`.
        nan: As for `Selection`.

    Raises:
        WeightsError: NaN, or a tensor that has no magnitudes to rank.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        rescore: Rescore | None = None,
        dtype: torch.dtype | None = None,
        nan: NanPolicy = "raise",
    ) -> None:
        self._tensors = Weights(tensors, dtype=dtype).tensors
        common = Weights(tensors, dtype=dtype).dtype
        scores = [
            (tensor if rescore is None else rescore(name, tensor)).to("cpu", common).abs().reshape(-1)
            for name, tensor in self._tensors.items()
        ]
        if nan == "raise":
            refuse_nan({name: int(score.isnan().sum()) for name, score in zip(self._tensors, scores, strict=True)})
        flat = torch.cat(scores) if scores else torch.empty(0, dtype=common)
        self._magnitudes, self._order = torch.where(flat.isnan(), -1.0, flat).sort(stable=True)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self._order.numel()

    def lines(self, ranks: Sequence[int]) -> list[Line]:
        """Lines below which exactly `rank` weights lie."""
        return [self._line(rank) for rank in ranks]

    def bits(self, line: Line) -> dict[str, PackedBits]:
        """Packed bits of the weights above the line, by tensor."""
        kept = self._kept(sum(line.removed.values()))
        return {name: pack(decisions) for name, decisions in kept.items()}

    def bits_of_each(self, lines: Sequence[Line]) -> list[dict[str, PackedBits]]:
        """Packed bits of the weights above each line."""
        return [self.bits(line) for line in lines]

    def _line(self, rank: int) -> Line:
        if not 0 <= rank <= self.numel:
            raise SparsityError(f"Cannot remove {rank} of {self.numel} weights.")
        removed = {name: int((~kept).sum()) for name, kept in self._kept(rank).items()}
        threshold = float(self._magnitudes[rank - 1]) if rank else 0.0
        return Line(float("nan") if threshold < 0 else threshold, rank, np.zeros(0, np.int64), removed)

    def _kept(self, rank: int) -> dict[str, torch.Tensor]:
        kept = torch.ones(self.numel, dtype=torch.bool)
        kept[self._order[:rank]] = False
        sizes = [tensor.numel() for tensor in self._tensors.values()]
        return dict(zip(self._tensors, torch.split(kept, sizes), strict=True))
