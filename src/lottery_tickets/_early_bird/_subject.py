"""What is watched: single weights by their magnitudes, or whole units by their scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lottery_tickets._batches import inputs_of
from lottery_tickets._early_bird._settings import Settings
from lottery_tickets._structured import Drawing, Named, Ranking, Rule, normalised, units_of
from lottery_tickets.magnitude_pruning import create_magnitude_mask
from lottery_tickets.masks import Kind, Mask, ShardedMask, Units, prunable_parameters, reshard

Tensors = Mapping[str, torch.Tensor]


class Subject(Protocol):
    """Numbers that are ranked, masks of them, and the tickets that these stand for."""

    criterion: str

    def tensors(self) -> Tensors:
        """What is ranked, as it is now."""

    def masks(self, tensors: Tensors, sparsities: Sequence[float]) -> list[Mask]:
        """Masks of the same names and shapes."""

    def ticket(self, mask: Mask) -> Mask:
        """The mask of the model's weights that such a mask means."""


class Weights:
    """Every prunable weight by itself.

    Args:
        model: Its prunable parameters are watched.
        settings: Which of them.
    """

    criterion = "magnitude"

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self._model, self._settings = model, settings

    def tensors(self) -> Tensors:
        """The weights, asked for anew each time.

        A user's training may put others in their places, and modules in parts are whole after a forward pass.
        """
        reshard(self._model)
        return prunable_parameters(self._model, self._settings.include, self._settings.exclude)

    def masks(self, tensors: Tensors, sparsities: Sequence[float]) -> list[Mask]:
        """By magnitude, one threshold for all; whole, an eighth of a byte a weight, as detectors take them."""
        drawn: Any = create_magnitude_mask(tensors, sparsities, progress=False, check_memory=False)
        return [mask.gathered() if isinstance(mask, ShardedMask) else mask for mask in drawn]

    def ticket(self, mask: Mask) -> Mask:
        """The mask itself."""
        return mask


class Channels:
    """Channels, heads or neurons: one bit for each, a sparsity being the share of them that goes.

    Ranked by the scales of their batch normalisation where each has one, else by the magnitude of their weights.

    Args:
        model: Whose units are watched.
        kind: Of what kind.
        batch: To trace the model with.
    """

    def __init__(self, model: nn.Module, kind: Kind, batch: Any) -> None:
        self._model = model
        self.units: Units = units_of(model, kind, inputs_of(model, batch))
        criterion: Named = "bn_scale" if normalised(model, self.units) else "magnitude"
        self.criterion: str = criterion
        self._rule = Rule(count="units")
        self._drawing = Drawing(self.units, criterion, self._rule)

    def tensors(self) -> Tensors:
        """A score for each unit, by group."""
        return {name: torch.from_numpy(scores) for name, scores in self._drawing.scores(self._model).items()}

    def masks(self, tensors: Tensors, sparsities: Sequence[float]) -> list[Mask]:
        """Those with the lowest scores go; one of each group stays."""
        scores = {name: scores.numpy() for name, scores in tensors.items()}
        found = Ranking(self.units, scores, {}, self._rule).kept(sparsities)
        return [Mask.from_tensors({name: torch.from_numpy(one) for name, one in kept.items()}) for kept in found]

    def ticket(self, mask: Mask) -> Mask:
        """The mask that keeps these units."""
        return self._drawing.mask(self._model, {name: np.asarray(bits) for name, bits in mask.items()})
