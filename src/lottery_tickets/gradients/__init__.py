"""Gradients of single samples inside the backward pass, and the sums they are consumed by."""

from lottery_tickets.gradients._data import Samples
from lottery_tickets.gradients._grasp import compute_grasp_importance
from lottery_tickets.gradients._model import borrowed, refuse_folder
from lottery_tickets.gradients._passes import Gradients, Grouping
from lottery_tickets.gradients._ranks import add_ranks
from lottery_tickets.gradients._scores import Criterion, Options, Scored, compute_scores, scorable
from lottery_tickets.gradients._stores import Store, Tensors, write_whole
from lottery_tickets.gradients._sums import Moments, Statistic, Sums, check_finite
from lottery_tickets.gradients._synflow import compute_synflow_importance
from lottery_tickets.gradients._together import InStep, Together, refuse_other_parts
from lottery_tickets.gradients._wanda import InputNorms

__all__ = [
    "Criterion",
    "Gradients",
    "Grouping",
    "InStep",
    "InputNorms",
    "Moments",
    "Options",
    "Samples",
    "Scored",
    "Statistic",
    "Store",
    "Sums",
    "Tensors",
    "Together",
    "add_ranks",
    "borrowed",
    "check_finite",
    "compute_grasp_importance",
    "compute_scores",
    "compute_synflow_importance",
    "refuse_folder",
    "refuse_other_parts",
    "scorable",
    "write_whole",
]
