"""A batch of any usual form and a model, to a loss sum and what it is a sum over."""

from lottery_tickets._batches._calls import Inputs, inputs_of, samples_of, size_of
from lottery_tickets._batches._conventions import is_transformers
from lottery_tickets._batches._in_step import in_step
from lottery_tickets._batches._losses import BatchLoss, total
from lottery_tickets._batches._measure import (
    LossFunction,
    Precision,
    batches_of,
    check_precision,
    evaluating,
    kept_positions,
    measure,
    measure_mean,
    output_of,
    run,
    with_samples,
)
from lottery_tickets._batches._units import SampleLosses

__all__ = [
    "BatchLoss",
    "Inputs",
    "LossFunction",
    "Precision",
    "SampleLosses",
    "batches_of",
    "check_precision",
    "evaluating",
    "in_step",
    "inputs_of",
    "is_transformers",
    "kept_positions",
    "measure",
    "measure_mean",
    "output_of",
    "run",
    "samples_of",
    "size_of",
    "total",
    "with_samples",
]
