"""A batch of any usual form and a model, to a loss sum and what it is a sum over."""

from lottery_tickets._batches._losses import BatchLoss, total
from lottery_tickets._batches._measure import (
    LossFunction,
    Precision,
    batches_of,
    check_precision,
    evaluating,
    measure,
    measure_mean,
)

__all__ = [
    "BatchLoss",
    "LossFunction",
    "Precision",
    "batches_of",
    "check_precision",
    "evaluating",
    "measure",
    "measure_mean",
    "total",
]
