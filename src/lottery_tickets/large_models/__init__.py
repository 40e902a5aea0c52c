"""When memory is short: checkpoints on disk, tensor by tensor; and what an operation takes, before it starts."""

from lottery_tickets.large_models._checkpoints import compute_weights_digest, read_checkpoint
from lottery_tickets.large_models._copies import PrunedCheckpoint, copy_companions, prune_checkpoint
from lottery_tickets.large_models._loading import load_model, load_tokenizer, resolve_model
from lottery_tickets.large_models._weights import MappedWeights, map_weights
from lottery_tickets.planning import MemoryPlan, plan_memory

__all__ = [
    "MappedWeights",
    "MemoryPlan",
    "PrunedCheckpoint",
    "compute_weights_digest",
    "copy_companions",
    "load_model",
    "load_tokenizer",
    "map_weights",
    "plan_memory",
    "prune_checkpoint",
    "read_checkpoint",
    "resolve_model",
]
