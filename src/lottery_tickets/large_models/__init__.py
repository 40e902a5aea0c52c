"""When memory is short: checkpoints on disk, tensor by tensor and block by block; what an operation takes."""

from lottery_tickets.large_models._checkpoints import compute_weights_digest, read_checkpoint
from lottery_tickets.large_models._copies import PrunedCheckpoint, copy_companions, prune_checkpoint
from lottery_tickets.large_models._hidden_states import HiddenStates
from lottery_tickets.large_models._loading import load_model, load_tokenizer, resolve_model
from lottery_tickets.large_models._mapped_models import MappedModel, map_model
from lottery_tickets.large_models._weights import MappedWeights, map_parameters, map_weights
from lottery_tickets.planning import MemoryPlan, plan_memory

__all__ = [
    "HiddenStates",
    "MappedModel",
    "MappedWeights",
    "MemoryPlan",
    "PrunedCheckpoint",
    "compute_weights_digest",
    "copy_companions",
    "load_model",
    "load_tokenizer",
    "map_model",
    "map_parameters",
    "map_weights",
    "plan_memory",
    "prune_checkpoint",
    "read_checkpoint",
    "resolve_model",
]
