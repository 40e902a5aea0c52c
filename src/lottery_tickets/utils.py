"""The helpers under one roof, for those who import them from `lottery_tickets.utils`.

Nothing inside the library imports this module.
"""

from lottery_tickets.determinism import ensure_deterministic_pruning
from lottery_tickets.inspection import compute_sparsity, get_model_size, validate_pruning_correctness
from lottery_tickets.masks import Mask, applied, apply_mask, parameter_aliases, prunable_parameters, remove_mask
from lottery_tickets.overlap import compute_ticket_overlap
from lottery_tickets.sparsity import compute_histogram_quantile

__all__ = [
    "Mask",
    "applied",
    "apply_mask",
    "compute_histogram_quantile",
    "compute_sparsity",
    "compute_ticket_overlap",
    "ensure_deterministic_pruning",
    "get_model_size",
    "parameter_aliases",
    "prunable_parameters",
    "remove_mask",
    "validate_pruning_correctness",
]
