"""How much is removed, and where the line is drawn."""

from lottery_tickets.sparsity._allocation import (
    MakeSelector,
    Selector,
    bits_above_floor,
    check_sparsity,
    one_or_many,
    removals_by_weight,
    removed_count,
)
from lottery_tickets.sparsity._blocks import Rescore
from lottery_tickets.sparsity._quantile import compute_histogram_quantile
from lottery_tickets.sparsity._selection import Line, NanPolicy, Reduce, Selection
from lottery_tickets.sparsity._sorting import Sorting

__all__ = [
    "Line",
    "MakeSelector",
    "NanPolicy",
    "Reduce",
    "Rescore",
    "Selection",
    "Selector",
    "Sorting",
    "bits_above_floor",
    "check_sparsity",
    "compute_histogram_quantile",
    "one_or_many",
    "removals_by_weight",
    "removed_count",
]
