"""Lottery tickets: sparse subnetworks that do as well as the whole network, found and judged exactly."""

from lottery_tickets.determinism import ensure_deterministic_pruning
from lottery_tickets.errors import LayerCollapseWarning, LotteryTicketError
from lottery_tickets.evaluation import compute_lottery_ticket_qualities, compute_lottery_ticket_quality
from lottery_tickets.inspection import compute_sparsity, get_model_size, validate_pruning_correctness
from lottery_tickets.magnitude_pruning import compute_layerwise_magnitude_ticket, create_magnitude_mask
from lottery_tickets.masks import Mask, applied, apply_mask, prunable_parameters, remove_mask
from lottery_tickets.overlap import compute_ticket_overlap
from lottery_tickets.sparsity import compute_histogram_quantile

__all__ = [
    "LayerCollapseWarning",
    "LotteryTicketError",
    "Mask",
    "applied",
    "apply_mask",
    "compute_histogram_quantile",
    "compute_layerwise_magnitude_ticket",
    "compute_lottery_ticket_qualities",
    "compute_lottery_ticket_quality",
    "compute_sparsity",
    "compute_ticket_overlap",
    "create_magnitude_mask",
    "ensure_deterministic_pruning",
    "get_model_size",
    "prunable_parameters",
    "remove_mask",
    "validate_pruning_correctness",
]
