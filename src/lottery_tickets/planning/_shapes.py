"""What the bytes of an operation hang on, read off a model's parameters once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from lottery_tickets.masks import Patterns, chosen_parameters, is_sharded, local_of, packed_size
from lottery_tickets.planning._trace import Trace
from lottery_tickets.training import DecoderSizes, decoder_sizes

_HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model, or of tensors without one.

    Attributes:
        model: None for tensors.
        weights: Bytes of all parameters and buffers.
        narrow: Floating-point numbers of two bytes among them.
        width: Bytes of a parameter, that of the first.
        prunable: Name to the number of weights.
        largest: Bytes of the largest prunable tensor.
        decoder: Of an architecture whose activations are known; else None.
        trace: Of another architecture: what tells them.
        held: Prunable weights that this rank holds of a model in parts; None for all.
    """

    model: nn.Module | None
    weights: int
    narrow: int
    width: int
    prunable: Mapping[str, int]
    largest: int
    decoder: DecoderSizes | None
    trace: Trace | None = None
    held: int | None = None

    @classmethod
    def of_model(
        cls, model: nn.Module, include: Patterns = None, exclude: Patterns = None, *, traced: bool = False
    ) -> Shapes:
        """Of a module on any device.

        Args:
            model: The module.
            include: Widens what is prunable.
            exclude: Narrows it.
            traced: Whether another architecture's activations are told from runs on the meta device, which take
                seconds.

        Raises:
            ParameterSelectionError: See `prunable_parameters`.
        """
        numbers: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
        chosen = chosen_parameters(model, include, exclude, only_weights=True)
        found = cls._of(numbers, chosen, model, decoder_sizes(model))
        return replace(found, trace=Trace(model, chosen)) if traced and found.decoder is None else found

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Shapes:
        """Of weights or scores by name, all of which are ranked."""
        return cls._of(list(tensors.values()), tensors, None, None)

    @classmethod
    def of_sizes(cls, sizes: Mapping[str, int], width: int) -> Shapes:
        """Of weights by name of which the number is known, and the bytes of each."""
        return cls(
            model=None,
            weights=width * sum(sizes.values()),
            narrow=sum(sizes.values()) if width == 2 else 0,
            width=width,
            prunable=dict(sizes),
            largest=width * max(sizes.values(), default=0),
            decoder=None,
        )

    @classmethod
    def _of(
        cls,
        numbers: list[torch.Tensor],
        chosen: Mapping[str, torch.Tensor],
        model: nn.Module | None,
        decoder: DecoderSizes | None,
    ) -> Shapes:
        return cls(
            model=model,
            weights=sum(one.numel() * one.element_size() for one in numbers),
            narrow=sum(one.numel() for one in numbers if one.dtype in _HALVES),
            width=numbers[0].element_size() if numbers else 4,
            prunable={name: one.numel() for name, one in chosen.items()},
            largest=max((one.numel() * one.element_size() for one in chosen.values()), default=0),
            decoder=decoder,
            held=sum(local_of(one).numel() for one in chosen.values())
            if any(map(is_sharded, chosen.values()))
            else None,
        )

    @property
    def count(self) -> int:
        """Prunable weights on this rank."""
        return sum(self.prunable.values()) if self.held is None else self.held

    @property
    def most(self) -> int:
        """Weights of the largest prunable tensor."""
        return max(self.prunable.values(), default=0)

    @property
    def mask(self) -> int:
        """Bytes of a packed mask."""
        return sum(packed_size(numel) for numel in self.prunable.values())
