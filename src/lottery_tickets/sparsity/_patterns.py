"""N:M: of every M weights that follow each other along the inputs of an output, the N that rank highest stay.

Groups of a convolution are M consecutive input channels at one place of the kernel. Flat, in the tensor's own
order, a group's members lie `inner` apart, the number of weights behind one step along the input dimension; so a
run of `M * inner` weights holds whole groups, and runs are ranked and packed where they lie.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.errors import SparsityError
from lottery_tickets.masks import PackedBits, packed_size
from lottery_tickets.sparsity._blocks import Block, Weights, block_size
from lottery_tickets.sparsity._layouts import Layout

# Up to this many members every pair is compared; beyond, the groups are sorted.
_PAIRWISE_UP_TO = 16
_BUFFERS = 16


@dataclass(frozen=True)
class NMPattern:
    """`kept` of every `group` consecutive weights stay."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> NMPattern:
        """Read "2:4".

        Raises:
            SparsityError: Text of another form, or not 1 <= N < M.
        """
        found = re.fullmatch(r"(\d+):(\d+)", text) if isinstance(text, str) else None
        if found is None or not 1 <= int(found[1]) < int(found[2]):
            raise SparsityError(
                f"pattern is 'N:M', N weights kept of every M, with 1 <= N < M, such as '2:4'; got {text!r}."
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float:
        """Fraction removed."""
        return 1 - self.kept / self.group

    def divides(self, shape: torch.Size, layout: Layout) -> bool:
        """Whether the inputs of every output fall into whole groups."""
        return len(shape) >= 2 and shape[layout.input_dim] % (self.group * layout.groups) == 0


def bits_by_pattern(
    weights: Weights, pattern: NMPattern, layout: Layout, *, progress: str | None = None
) -> PackedBits:
    """Packed bits of one tensor, exactly `pattern.kept` set in every group.

    Equal weights rank by position, the earlier pruned first.

    Args:
        weights: The one tensor.
        pattern: One that `divides` the tensor's shape.
        layout: Where its input dimension lies.
        progress: Name of a progress bar; None for none.
    """
    (tensor,) = weights.tensors.values()
    packed = np.zeros(packed_size(tensor.numel()), np.uint8)
    if not tensor.numel():
        return packed
    inner = math.prod(tensor.shape[layout.input_dim + 1 :])
    whole = math.lcm(pattern.group * inner, 8)
    size = max(1, block_size(weights.dtype, _BUFFERS) // whole) * whole

    def pack_run(run: Block) -> None:
        groups = weights.magnitudes(run.start, run.stop).reshape(-1, pattern.group, inner)
        bits = np.packbits(strongest(groups, pattern.kept).reshape(-1), bitorder="little")
        packed[run.start // 8 : run.start // 8 + bits.size] = bits

    runs = [Block(0, start, min(start + size, tensor.numel())) for start in range(0, tensor.numel(), size)]
    weights.for_each(pack_run, runs, progress=progress)
    return packed


def strongest(groups: npt.NDArray[Any], kept: int) -> npt.NDArray[np.bool_]:
    """Where the `kept` largest along axis 1 are, of equal ones the later."""
    size = groups.shape[1]
    if size > _PAIRWISE_UP_TO:
        order = np.argsort(groups, axis=1, kind="stable")
        stays = np.ones(groups.shape, np.bool_)
        np.put_along_axis(stays, order[:, : size - kept], False, axis=1)
        return stays
    members = np.ascontiguousarray(groups.transpose(1, 0, 2))
    outranked = np.empty(members.shape, np.uint8)
    for member in range(size):
        outranked[member] = size - 1 - member
    for later in range(1, size):
        for earlier in range(later):
            loses = members[earlier] <= members[later]
            outranked[later] += loses
            outranked[earlier] -= loses
    return np.ascontiguousarray((outranked >= size - kept).transpose(1, 0, 2))
