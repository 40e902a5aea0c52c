"""Weights read in float32 and written back in what they are kept in, a block at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from lottery_tickets.errors import TrainingError
from lottery_tickets.training._rounding import round_stochastically

Precision = Literal["stochastic", "compensated", "nearest"]
HALVES = (torch.bfloat16, torch.float16)

# Elements computed at a time: some buffers of float32 of this length are all that an update adds to memory. On the
# CPU they stay in its caches, and small ones leave no holes between gradients on the heap; elsewhere every block
# costs a few launches.
BLOCK, BLOCK_ELSEWHERE = 1 << 17, 1 << 22


def check_precision(precision: str) -> None:
    """Raise TrainingError for an unknown precision."""
    if precision not in get_args(Precision):
        raise TrainingError(f"precision is one of {', '.join(get_args(Precision))}; got {precision!r}.")


def is_half(tensor: torch.Tensor) -> bool:
    """Whether small steps are lost in this tensor's data type."""
    return tensor.dtype in HALVES


@dataclass(frozen=True)
class Block:
    """The elements of one tensor from `start` on, in row-major order, and the same ones of other tensors."""

    start: int
    parts: tuple[torch.Tensor, ...]


def blocks(*tensors: torch.Tensor, size: int | None = None) -> Iterator[Block]:
    """Tensors of one shape, cut alike into views of about `size` elements."""
    first = tensors[0]
    if size is None:
        size = BLOCK if first.is_cpu else BLOCK_ELSEWHERE
    if all(tensor.is_contiguous() for tensor in tensors):
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, first.numel(), size):
            yield Block(start, tuple(tensor[start : start + size] for tensor in flat))
    elif first.numel():
        row = first.numel() // len(first)
        step = max(1, size // row)
        for start in range(0, len(first), step):
            yield Block(start * row, tuple(tensor[start : start + step] for tensor in tensors))


def widened(weights: torch.Tensor, lost: torch.Tensor | None) -> torch.Tensor:
    """A new float32 copy, with what rounding lost before."""
    wide: torch.Tensor = weights.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    return wide if lost is None else wide.add_(lost)


def write(
    wide: torch.Tensor,
    weights: torch.Tensor,
    lost: torch.Tensor | None,
    *,
    precision: Precision,
    key: int,
    start: int,
) -> None:
    """Round float32 into `weights` by the precision asked for; what is lost goes into `lost` if there is one."""
    if precision == "stochastic":
        rounded = round_stochastically(wide.reshape(-1), weights.dtype, key, start)
        weights.copy_(rounded.view(wide.shape))
        return
    weights.copy_(wide)
    if lost is not None:
        # Exact in float32: both have the same leading digits. An overflow loses what cannot be kept.
        lost.copy_(wide.sub_(weights).nan_to_num_(0.0, 0.0, 0.0))


def norm_of(gradient: torch.Tensor) -> torch.Tensor:
    """Euclidean norm, in float32 at least; halves are widened block by block."""
    norm: torch.Tensor
    if not is_half(gradient):
        norm = torch.linalg.vector_norm(gradient)
        return norm
    # One buffer for all blocks: a new one beside each small result would leave the old ones as holes on the heap.
    parts = [block.parts[0] for block in blocks(gradient)]
    wide = gradient.new_empty(max((part.numel() for part in parts), default=0), dtype=torch.float32)
    norms = gradient.new_zeros(len(parts), dtype=torch.float32)
    for index, part in enumerate(parts):
        torch.linalg.vector_norm(wide[: part.numel()].view(part.shape).copy_(part), out=norms[index])
    return combined(list(norms))


def all_finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether no element of any is infinite or NaN; False may also be said of very large ones."""
    return all(math.isfinite(one.sum().item()) for one in gradients)


def combined(norms: Sequence[torch.Tensor]) -> torch.Tensor:
    """Norm of all from the norms of the parts."""
    if not norms:
        return torch.zeros(())
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack([one.to(norms[0].device) for one in norms]))
    return norm


def is_finite(gradient: torch.Tensor, norm: torch.Tensor) -> bool:
    """Whether no element is infinite or NaN."""
    if math.isfinite(norm.item()):
        return True
    # The norm of large finite numbers overflows.
    return all(bool(one.isfinite()) for block in blocks(gradient) for one in torch.aminmax(block.parts[0]))
