"""Where a weight tensor keeps its inputs and its outputs.

Linear and convolution layers store (output, input, *kernel). Transposed convolutions store
(input, output, *kernel), the inputs group by group, and transformers' Conv1D (input, output). Only the module
tells; of a tensor alone the first is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from lottery_tickets.masks import is_transposed_linear, places_of

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Layout:
    """The dimension that runs over the inputs of an output, and the groups that those inputs come in.

    Attributes:
        input_dim: 1, or 0 where the weight is stored the other way round.
        groups: Along dimension 0 of a weight stored the other way round, inputs of different outputs.
    """

    input_dim: int = 1
    groups: int = 1

    @property
    def rows_first(self) -> bool:
        """Whether an output's weights lie side by side."""
        return self.input_dim == 1

    def by_output(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Views of the tensor, or of its groups, whose first dimension runs over the outputs."""
        if self.rows_first or tensor.dim() < 2:
            return [tensor]
        return [group.transpose(0, 1) for group in tensor.chunk(self.groups)]

    def row_count(self, shape: torch.Size) -> int:
        """Number of outputs; what has fewer than two dimensions is one row."""
        if len(shape) < 2:
            return 1
        return shape[0] if self.rows_first else shape[1] * self.groups


def layouts_of(model: nn.Module, parameters: Mapping[str, torch.Tensor]) -> dict[str, Layout]:
    """The layout of each of these parameters, as the first module that holds it stores it."""
    places = places_of(model, parameters)
    return {name: _layout(found[0].module) if found else Layout() for name, found in places.items()}


def _layout(module: nn.Module) -> Layout:
    if isinstance(module, _TRANSPOSED):
        return Layout(input_dim=0, groups=module.groups)
    return Layout(input_dim=0) if is_transposed_linear(module) else Layout()
