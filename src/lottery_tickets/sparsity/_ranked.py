"""Weights that a mask is drawn from, and how they rank: whole ones, or what one of several ranks holds of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypedDict, cast

import torch

from lottery_tickets.errors import SparsityError
from lottery_tickets.masks import Division, Mask, PackedBits, ShardedMask, local_of
from lottery_tickets.sparsity._allocation import Selector
from lottery_tickets.sparsity._blocks import Pages, Rescore, Weights
from lottery_tickets.sparsity._layouts import Layout
from lottery_tickets.sparsity._selection import NanPolicy, Selection
from lottery_tickets.sparsity._sorting import Sorting


class Parts(TypedDict):
    """Weights as this rank holds them, and how they are spread; None if they are whole."""

    tensors: Mapping[str, torch.Tensor]
    division: Division | None


def parts_of(tensors: Mapping[str, torch.Tensor]) -> Parts:
    """What this rank holds of tensors; plain ones as they are. All ranks make this call where some lie in parts.

    Raises:
        WeightsError: Placements of a kind that is not known.
        DistributedError: The ranks speak of different tensors.
    """
    division = Division.of(tensors)
    return Parts(tensors={name: local_of(tensor) for name, tensor in tensors.items()}, division=division)


@dataclass(frozen=True)
class Ranked:
    """Weights, and how they rank.

    Attributes:
        tensors: Name to weights or scores, of a sharded model this rank's parts; the magnitude ranks.
        layouts: Where each keeps its inputs; `Layout()` for those not named.
        rescore: What ranks in the place of the magnitude; see `Weights`.
        dtype: What it is compared in.
        nan: "raise" refuses NaN, "prune" ranks it below everything.
        use_histogram: Draw lines by counting; else by sorting, to the same bits.
        pages: What is told where weights will be read, if they lie in files.
        division: How tensors of which these are parts are spread over ranks; None if they are whole.
        progress: Name of a progress bar; None for none.
    """

    tensors: Mapping[str, torch.Tensor]
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    rescore: Rescore | None = None
    dtype: torch.dtype | None = None
    nan: NanPolicy = "raise"
    use_histogram: bool = True
    pages: Pages | None = None
    division: Division | None = None
    progress: str | None = None

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Name to the shape of the whole tensor."""
        if self.division is not None:
            return {name: self.division.shards[name].shape for name in self.tensors}
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    @property
    def numels(self) -> dict[str, int]:
        """Name to the number of weights of the whole tensor."""
        return {name: shape.numel() for name, shape in self.shapes.items()}

    @property
    def shown(self) -> str | None:
        """Name of a progress bar here: one bar is that of all ranks."""
        return self.progress if self.division is None or self.division.ranks.first else None

    def selector(self, names: Iterable[str]) -> Selector:
        """What draws lines through some of the tensors.

        Raises:
            SparsityError: Sorting what lies on several ranks.
        """
        tensors = {name: self.tensors[name] for name in names}
        if self.use_histogram:
            make = partial(Selection, division=self.division, pages=self.pages, progress=self.shown)
            return make(tensors, rescore=self.rescore, dtype=self.dtype, nan=self.nan)
        if self.division is not None:
            raise SparsityError(
                "use_histogram=False sorts all weights in one place, and these lie on several ranks. Leave it at "
                "True, which gives the same bits."
            )
        return Sorting(tensors, rescore=self.rescore, dtype=self.dtype, nan=self.nan)

    def weights(self, tensors: Mapping[str, torch.Tensor]) -> Weights:
        """Tensors, or parts of them by the same names, as integers that rank."""
        return Weights(
            tensors,
            rescore=self.rescore,
            dtype=self.dtype,
            nan_first=self.nan == "prune",
            pages=self.pages,
        )

    def layout(self, name: str) -> Layout:
        """Where this tensor keeps its inputs."""
        return self.layouts.get(name, Layout())

    def mask(self, bits: Mapping[str, PackedBits]) -> Mask:
        """The mask with these bits, sharded as the weights are; then all ranks make this call."""
        if self.division is None:
            return Mask.from_packed(bits, self.shapes)
        # A sharded mask answers as a mask does in all but what it holds here.
        return cast(Mask, ShardedMask.from_packed(bits, self.division))

    @contextmanager
    def together(self, asked: str) -> Iterator[None]:
        """A block in which an error on one rank is one on all, and in which all are asked for the same.

        Raises:
            DistributedError: Another rank failed, or is asked for something else.
        """
        if self.division is None:
            yield
            return
        with self.division.ranks.together():
            self.division.ranks.check_asked_alike(asked)
            yield
