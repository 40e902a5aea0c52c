"""Everything as it was at the rewinding point, in memory or in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lottery_tickets.runs import RunFolder, decoded, encoded
from lottery_tickets.training import Point, to_be_written

_NAME = "rewind"

Options = list[dict[str, Any]]


@dataclass(frozen=True)
class RewindPoint:
    """A training at one of its steps.

    Attributes:
        tensors: Weights and buffers of the model; of one in parts DTensors, or whole ones mapped from a file.
        training: State of the course.
        options: Of each of the optimizer's groups: learning rate and the like.
    """

    tensors: Mapping[str, torch.Tensor]
    training: Mapping[str, Any]
    options: Options

    @property
    def point(self) -> Point:
        """Where in the data."""
        return Point.of(self.training["point"])

    def copied(self) -> RewindPoint:
        """The same in memory of its own."""
        tensors = {name: one.clone() for name, one in self.tensors.items()}
        return RewindPoint(tensors, deepcopy(self.training), deepcopy(self.options))

    def kept_in(self, run: RunFolder) -> RewindPoint:
        """The same, written to the run's folder and mapped from there."""
        others: dict[str, torch.Tensor] = {}
        values = {
            "training": encoded(self.training, others, "training"),
            "options": encoded(self.options, others, "options"),
        }
        files = {"model": self.tensors, "others": others}
        run.keep(_NAME, values, {name: to_be_written(one, run.ranks) for name, one in files.items()})
        return RewindPoint.kept(run)

    @classmethod
    def kept(cls, run: RunFolder) -> RewindPoint:
        """What `kept_in` wrote."""
        state = run.kept(_NAME)
        others = state.tensors("others")
        values = (decoded(state.values[name], others) for name in ("training", "options"))
        return cls(state.tensors("model"), *values)

    @staticmethod
    def path_in(run: RunFolder) -> Path:
        """The file of the model's weights and buffers."""
        return run.path / _NAME / "model.safetensors"
