"""When memory is short: checkpoints on disk, tensor by tensor."""

from lottery_tickets.large_models._checkpoints import compute_weights_digest, read_checkpoint
from lottery_tickets.large_models._copies import PrunedCheckpoint, prune_checkpoint
from lottery_tickets.large_models._loading import load_model, load_tokenizer, resolve_model

__all__ = [
    "PrunedCheckpoint",
    "compute_weights_digest",
    "load_model",
    "load_tokenizer",
    "prune_checkpoint",
    "read_checkpoint",
    "resolve_model",
]
