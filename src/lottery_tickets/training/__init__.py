"""Training that takes little more memory than the weights: steps made inside the backward pass."""

from lottery_tickets.training._activations import Checkpointing, blocks_of, checkpointed, checkpointed_blocks
from lottery_tickets.training._fused_sgd import FusedSGD
from lottery_tickets.training._memory import TrainingBytes, log_training_bytes, training_bytes
from lottery_tickets.training._optimizers import AfterBackward, InBackward, MakeOptimizer, Stepper, make_optimizer
from lottery_tickets.training._passes import Clip
from lottery_tickets.training._weights import Precision

__all__ = [
    "AfterBackward",
    "Checkpointing",
    "Clip",
    "FusedSGD",
    "InBackward",
    "MakeOptimizer",
    "Precision",
    "Stepper",
    "TrainingBytes",
    "blocks_of",
    "checkpointed",
    "checkpointed_blocks",
    "log_training_bytes",
    "make_optimizer",
    "training_bytes",
]
