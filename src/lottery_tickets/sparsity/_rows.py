"""One line for every output row: each loses the weights that rank lowest among its own."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lottery_tickets.masks import PackedBits, pack, packed_size
from lottery_tickets.sparsity._blocks import Block, MakeWeights, Weights, block_size
from lottery_tickets.sparsity._layouts import Layout

# Takes the number of a block's first row, and what is kept of the rows from there on.
_Store = Callable[[int, npt.NDArray[np.bool_]], None]
_BUFFERS = 16


def bits_by_row(
    name: str,
    tensor: torch.Tensor,
    removed: int,
    make: MakeWeights,
    layout: Layout,
    *,
    progress: str | None = None,
) -> PackedBits:
    """Packed bits of one tensor without `removed` of its weights, as many from every row.

    Every row loses `removed // rows` weights and the first `removed % rows` rows one more, so a larger number
    removes what a smaller one does. Equal weights rank by position, the earlier pruned first. Rows are ranked
    block by block; a tensor whose rows do not lie side by side takes a byte a weight until it is packed.

    Args:
        name: What the tensor is called.
        tensor: The weights.
        removed: How many go in all.
        make: Gives a tensor's weights what they rank by.
        layout: Where its rows lie.
        progress: Name of a progress bar; None for none.
    """
    rows = layout.row_count(tensor.shape)
    if not tensor.numel():
        return np.zeros(0, np.uint8)
    quotas = quotas_of_rows(rows, removed)
    if layout.rows_first or tensor.dim() < 2:
        packed = np.empty(packed_size(tensor.numel()), np.uint8)
        length = tensor.numel() // rows

        def pack_rows(first: int, kept: npt.NDArray[np.bool_]) -> None:
            bits = np.packbits(kept.reshape(-1), bitorder="little")
            start = first * length // 8
            packed[start : start + bits.size] = bits

        decide_rows(make({name: tensor}), quotas, pack_rows, progress)
        return packed
    decisions = torch.empty(tensor.shape, dtype=torch.bool)
    parts = zip(layout.by_output(tensor), layout.by_output(decisions), strict=True)
    for part, (weights, target) in enumerate(parts):
        outputs = weights.shape[0]

        def place_rows(first: int, kept: npt.NDArray[np.bool_], target: torch.Tensor = target) -> None:
            rows = target[first : first + kept.shape[0]]
            rows.copy_(torch.from_numpy(kept).view(rows.shape))

        decide_rows(make({name: weights}), quotas[part * outputs : (part + 1) * outputs], place_rows, progress)
    return pack(decisions)


def quotas_of_rows(rows: int, removed: int) -> npt.NDArray[np.int64]:
    """How many weights each row loses."""
    quotas = np.full(rows, removed // rows)
    quotas[: removed % rows] += 1
    return quotas


def decide_rows(
    weights: Weights, quotas: npt.NDArray[np.int64], store: _Store, progress: str | None = None
) -> None:
    """Rank blocks of whole rows; each begins at a whole byte of the packed bits."""
    rows = quotas.size
    length = weights.numel // rows
    together = 8 // math.gcd(length, 8)
    size = max(1, block_size(weights.dtype, _BUFFERS) // (length * together)) * together

    def rank_rows(block: Block) -> None:
        first, last = block.start // length, block.stop // length
        keys = weights.magnitudes(block.start, block.stop).reshape(last - first, length)
        store(first, _kept(keys, quotas[first:last]))

    blocks = [Block(0, first * length, min(first + size, rows) * length) for first in range(0, rows, size)]
    weights.for_each(rank_rows, blocks, progress=progress)


def _kept(keys: npt.NDArray[Any], quotas: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Where a row's keys are not among its `quota` smallest, of equal ones the first."""
    kept = np.ones(keys.shape, np.bool_)
    for quota in np.unique(quotas[quotas > 0]):
        rows = quotas == quota
        kept[rows] = _kept_of_equal_quotas(keys[rows], int(quota))
    return kept


def _kept_of_equal_quotas(keys: npt.NDArray[Any], quota: int) -> npt.NDArray[np.bool_]:
    line = np.partition(keys, quota - 1, axis=1)[:, quota - 1, None]
    kept: npt.NDArray[np.bool_] = keys > line
    ties = keys == line
    pruned_ties = quota - (keys.shape[1] - kept.sum(axis=1) - ties.sum(axis=1))
    # Where not all ties go, which few rows have, the first do.
    some_stay = ties.sum(axis=1) > pruned_ties
    stays = ties[some_stay].cumsum(axis=1) > pruned_ties[some_stay, None]
    kept[some_stay] |= ties[some_stay] & stays
    return kept
