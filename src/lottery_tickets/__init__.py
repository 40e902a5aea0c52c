"""Lottery tickets: sparse subnetworks that do as well as the whole network, found and judged exactly.

The names in `__all__` are the promised ones; files may move, names may not. The root is what you do, the folders
are what it is made of, and a module imports only from the floors below its own:

    cli, utils                        the command line; helper names for those who look for them there
    integrations                      callbacks for the trainers of transformers and Lightning
    reports                           runs, tickets, scores -> one HTML file; figures for papers
    verdict                           models, data, tickets -> is it a winning ticket? controls and statistics
    early_bird                        model, data -> the ticket, at the moment at which it has settled
    iterative_pruning                 model, data -> the ticket, after rounds of training, pruning and rewinding
    stability                         which step is training settled enough to rewind to?
    magnitude_pruning                 model -> magnitude mask
    importance_scoring                model, data -> scores by any criterion
    importance_pruning                scores -> mask
    structured                        channels, heads, neurons -> mask; the smaller network without them
    evaluation                        model, mask, data -> quality
    robustness                        model, data -> loss over sparsities
    vision                            small networks and images to try things on
    overlap, inspection, determinism  masks beside each other, zeros and sizes, seeds
    large_models                      checkpoint folders, tensor by tensor, and models in them block by block
    gradients                         gradients of single samples, made in the backward pass and forgotten
    planning                          bytes of every operation, item by item, before it starts
    detection                         masks of successive checks -> has the ticket settled?
    training                          steps inside the backward pass, memory predicted before it starts
    sparsity                          how much is removed, and where the line is drawn
    masks, _batches                   what a ticket is; a batch of any form -> a loss that adds
    runs                              the folder of a run that can be killed at any moment and go on
    _ranks                            processes that count together, and fail together
    _kernels, errors                  compiled loops over bits; what can go wrong

Names are imported when they are first used, so that the command line answers without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lottery_tickets.determinism import ensure_deterministic_pruning
    from lottery_tickets.early_bird import compute_early_bird_tickets
    from lottery_tickets.errors import LayerCollapseWarning, LotteryTicketError
    from lottery_tickets.evaluation import compute_lottery_ticket_qualities, compute_lottery_ticket_quality
    from lottery_tickets.importance_pruning import create_importance_mask
    from lottery_tickets.inspection import compute_sparsity, get_model_size, validate_pruning_correctness
    from lottery_tickets.iterative_pruning import compute_iterative_magnitude_pruning
    from lottery_tickets.magnitude_pruning import compute_layerwise_magnitude_ticket, create_magnitude_mask
    from lottery_tickets.masks import (
        Mask,
        ShardedMask,
        applied,
        apply_mask,
        held,
        prunable_parameters,
        remove_mask,
    )
    from lottery_tickets.overlap import compute_ticket_overlap
    from lottery_tickets.robustness import compute_pruning_robustness
    from lottery_tickets.sparsity import compute_histogram_quantile
    from lottery_tickets.stability import compute_instability, compute_linear_mode_connectivity
    from lottery_tickets.structured import create_structured_mask, embed_subnetwork, extract_subnetwork
    from lottery_tickets.verdict import compute_ticket_verdict

__all__ = [
    "LayerCollapseWarning",
    "LotteryTicketError",
    "Mask",
    "ShardedMask",
    "applied",
    "apply_mask",
    "compute_early_bird_tickets",
    "compute_histogram_quantile",
    "compute_instability",
    "compute_iterative_magnitude_pruning",
    "compute_layerwise_magnitude_ticket",
    "compute_linear_mode_connectivity",
    "compute_lottery_ticket_qualities",
    "compute_lottery_ticket_quality",
    "compute_pruning_robustness",
    "compute_sparsity",
    "compute_ticket_overlap",
    "compute_ticket_verdict",
    "create_importance_mask",
    "create_magnitude_mask",
    "create_structured_mask",
    "embed_subnetwork",
    "ensure_deterministic_pruning",
    "extract_subnetwork",
    "get_model_size",
    "held",
    "prunable_parameters",
    "remove_mask",
    "validate_pruning_correctness",
]

# Modules that hold these names, those that load fastest first.
_HOMES = (
    *("errors", "masks", "sparsity", "magnitude_pruning", "importance_pruning"),
    *("evaluation", "robustness", "overlap", "inspection", "determinism", "early_bird", "iterative_pruning"),
    *("stability", "verdict", "structured"),
)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name in _HOMES:
            return import_module(f"{__name__}.{name}")
        if name in __all__:
            for home in _HOMES:
                module = import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    globals()[name] = getattr(module, name)
                    return globals()[name]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_HOMES})
