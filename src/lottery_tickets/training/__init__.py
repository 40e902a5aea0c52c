"""Training that takes little more memory than the weights: steps made inside the backward pass."""

from lottery_tickets.training._activations import Checkpointing, blocks_of, checkpointed, checkpointed_blocks
from lottery_tickets.training._after_backward import AfterBackward
from lottery_tickets.training._alike import check_alike, check_masks_alike
from lottery_tickets.training._configuration import configuration, described
from lottery_tickets.training._course import Course, Evaluation, Judge, Point, early_stopping
from lottery_tickets.training._fused_sgd import FusedSGD
from lottery_tickets.training._graph import uses_of
from lottery_tickets.training._joined import joined, let_go, lies_in_parts
from lottery_tickets.training._memory import (
    DecoderSizes,
    TrainingBytes,
    decoder_sizes,
    log_training_bytes,
    training_bytes,
)
from lottery_tickets.training._optimizers import InBackward, MakeOptimizer, Stepper, make_optimizer
from lottery_tickets.training._order import DataOrder
from lottery_tickets.training._parts import part_of, to_be_written
from lottery_tickets.training._passes import Clip
from lottery_tickets.training._peaks import devices_of, peak_bytes
from lottery_tickets.training._recipe import LEARNING_RATES, OptimizerFunction, Recipe, TrainerFunction, length_of
from lottery_tickets.training._sharing import SharedBatches
from lottery_tickets.training._snapshots import digest_of, restore_tensors, structure_digest, tensors_of
from lottery_tickets.training._trainer import Nonfinite, Progress, SchedulerFactory, Trainer, training
from lottery_tickets.training._weights import Precision, blocks

__all__ = [
    "LEARNING_RATES",
    "AfterBackward",
    "Checkpointing",
    "Clip",
    "Course",
    "DataOrder",
    "DecoderSizes",
    "Evaluation",
    "FusedSGD",
    "InBackward",
    "Judge",
    "MakeOptimizer",
    "Nonfinite",
    "OptimizerFunction",
    "Point",
    "Precision",
    "Progress",
    "Recipe",
    "SchedulerFactory",
    "SharedBatches",
    "Stepper",
    "Trainer",
    "TrainerFunction",
    "TrainingBytes",
    "blocks",
    "blocks_of",
    "check_alike",
    "check_masks_alike",
    "checkpointed",
    "checkpointed_blocks",
    "configuration",
    "decoder_sizes",
    "described",
    "devices_of",
    "digest_of",
    "early_stopping",
    "joined",
    "length_of",
    "let_go",
    "lies_in_parts",
    "log_training_bytes",
    "make_optimizer",
    "part_of",
    "peak_bytes",
    "restore_tensors",
    "structure_digest",
    "tensors_of",
    "to_be_written",
    "training",
    "training_bytes",
    "uses_of",
]
