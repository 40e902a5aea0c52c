"""How much is removed, and where the line is drawn."""

from lottery_tickets.sparsity._allocation import (
    MakeSelector,
    Selector,
    bits_above_floor,
    check_sparsity,
    erk_removals,
    given_removals,
    one_or_many,
    outlier_removals,
    removals_by_weight,
    removed_count,
    uniform_removals,
)
from lottery_tickets.sparsity._blocks import Block, Pages, Reduce, Rescore, Turn, Weights, for_each, rankable
from lottery_tickets.sparsity._counting import Ladder, count_pairs, rank_among
from lottery_tickets.sparsity._drawing import (
    Allocation,
    PatternRemainder,
    Rule,
    Scope,
    draw_masks,
    extremes,
    warn_of_collapse,
)
from lottery_tickets.sparsity._lamp import lamp_removals
from lottery_tickets.sparsity._layouts import Layout, layouts_of
from lottery_tickets.sparsity._outliers import outlier_shares
from lottery_tickets.sparsity._quantile import compute_histogram_quantile
from lottery_tickets.sparsity._ranked import Parts, Ranked, parts_of
from lottery_tickets.sparsity._selection import Line, NanPolicy, Selection
from lottery_tickets.sparsity._sorting import Sorting

__all__ = [
    "Allocation",
    "Block",
    "Ladder",
    "Layout",
    "Line",
    "MakeSelector",
    "NanPolicy",
    "Pages",
    "Parts",
    "PatternRemainder",
    "Ranked",
    "Reduce",
    "Rescore",
    "Rule",
    "Scope",
    "Selection",
    "Selector",
    "Sorting",
    "Turn",
    "Weights",
    "bits_above_floor",
    "check_sparsity",
    "compute_histogram_quantile",
    "count_pairs",
    "draw_masks",
    "erk_removals",
    "extremes",
    "for_each",
    "given_removals",
    "lamp_removals",
    "layouts_of",
    "one_or_many",
    "outlier_removals",
    "outlier_shares",
    "parts_of",
    "rank_among",
    "rankable",
    "removals_by_weight",
    "removed_count",
    "uniform_removals",
    "warn_of_collapse",
]
