"""Masks of a model at several sparsities, looked at again and again until they have settled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lottery_tickets._early_bird._results import EarlyBirdCheckpoint, EarlyBirdResults, EarlyBirdTraining
from lottery_tickets._early_bird._settings import Settings
from lottery_tickets.detection import EarlyBirdDetector, MagnitudeRanks, MovementProbe
from lottery_tickets.magnitude_pruning import create_magnitude_mask
from lottery_tickets.masks import Mask, prunable_parameters
