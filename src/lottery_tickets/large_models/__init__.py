"""When memory is short: checkpoints on disk, tensor by tensor; and what an operation takes, before it starts."""

from lottery_tickets.large_models._checkpoints import (
    PrunedCheckpoint,
    compute_weights_digest,
    prune_checkpoint,
    read_checkpoint,
)
from lottery_tickets.large_models._loading import load_model, load_tokenizer, resolve_model
from lottery_tickets.planning import MemoryPlan, plan_memory

__all__ = [
    "MemoryPlan",
    "PrunedCheckpoint",
    "compute_weights_digest",
    "load_model",
    "load_tokenizer",
    "plan_memory",
    "prune_checkpoint",
    "read_checkpoint",
    "resolve_model",
]
