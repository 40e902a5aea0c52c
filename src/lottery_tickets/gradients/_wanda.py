"""Weights by the size of what they are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from lottery_tickets._batches import kept_positions, run
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import ScoreError
from lottery_tickets.gradients._layers import add_weight_gradient, input_of, is_convolution, is_stock_layer
from lottery_tickets.gradients._sums import check_finite
from lottery_tickets.masks import Shard, places_of

# Weights that are turned into scores at a time, in float64.
_AT_A_TIME = 1 << 22
# Of the batch that goes through the model; forward passes that take turns have a context each.
_KEPT: ContextVar[torch.Tensor | None] = ContextVar("positions that are not padding", default=None)
_COUNTING: ContextVar[bool] = ContextVar("whether it counts", default=True)


class InputNorms:
    """Norms of what each weight is multiplied with, over all batches that have gone through a model.

    Args:
        model: Any module.
        parameters: Of its layers, by canonical name.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
        self._model = model
        self._layers = {
            name: list(dict.fromkeys(module for module, key in held if key == "weight" and is_stock_layer(module)))
            for name, held in places_of(model, parameters).items()
        }
        self._squares: dict[str, torch.Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The time in which what goes through the layers counts."""
        handles = [
            layer.register_forward_hook(self._watch(name), with_kwargs=True, prepend=True)
            for name, held in self._layers.items()
            for layer in held
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, batch: Any, *, is_own: bool = True) -> None:
        """Have a batch go through the model; positions that are padding count for nothing.

        Args:
            batch: Of any usual form.
            is_own: False for one that goes through for other ranks, and counts for nothing here.
        """
        before, counting = _KEPT.set(kept_positions(self._model, batch)), _COUNTING.set(is_own)
        try:
            run(self._model, batch)
        finally:
            _KEPT.reset(before)
            _COUNTING.reset(counting)

    def add_up(self, ranks: Ranks, device: torch.device) -> None:
        """Add what has gone through the layers on other ranks, of which some may not have called each."""
        shapes: dict[str, torch.Size] = {}
        for theirs in ranks.gather({name: squares.shape for name, squares in self._squares.items()}):
            shapes |= theirs
        for name in sorted(shapes):
            if name not in self._squares:
                self._squares[name] = torch.zeros(shapes[name], dtype=torch.float64, device=device)
            ranks.add_up(self._squares[name])

    def __contains__(self, name: object) -> bool:
        """Whether something has gone through the layers of this parameter."""
        return name in self._squares

    def score(self, name: str, weight: torch.Tensor, into: torch.Tensor, shard: Shard | None = None) -> None:
        """Magnitudes of weights times the norms, some rows at a time.

        Args:
            name: Of the parameter.
            weight: All of it, or a part.
            into: In the shape of what is given.
            shard: Which part that is.

        Raises:
            ScoreError: One that is not finite.
        """
        norms = self._squares[name].sqrt()
        filters = weight.shape[0] if shard is None else shard.shape[0]
        if norms.shape[0] not in (1, filters):  # a row for each group of filters, which see other channels
            norms = norms.repeat_interleave(filters // norms.shape[0], dim=0)
        if shard is not None:
            norms = shard.take(norms)
        rows = max(1, _AT_A_TIME // max(1, weight[:1].numel()))
        for start in range(0, len(weight), rows):
            part = norms if norms.shape[0] == 1 else norms[start : start + rows]
            into[start : start + rows] = (weight[start : start + rows].detach().abs().double() * part).float()
        check_finite(name, into)

    def refuse_missing(self) -> None:
        """Refuse parameters of which nothing is known.

        Raises:
            ScoreError: Naming them.
        """
        missing = [name for name in self._layers if name not in self._squares]
        if missing:
            raise ScoreError(
                f"No layer that holds {', '.join(missing)} was called, so there is no input to weigh it by: the "
                "weight is used some other way, or these samples do not reach it. Exclude it, or give more "
                "samples."
            )

    def _watch(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            if not _COUNTING.get():
                return
            found = _squares(layer, input_of(layer, args, kwargs), output, _KEPT.get())
            self._squares[name] = self._squares[name].add_(found) if name in self._squares else found

        return hook


def _squares(layer: Any, inputs: torch.Tensor, output: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Sum of squares of what each weight is multiplied with, float64, in a shape that broadcasts to the weight's.

    Filters of a convolution that see the same channels have the same; so there is one row for each group of them.
    """
    wide = inputs.detach().double().square()
    if is_convolution(layer):
        # The gradient of a weight sums input times output gradient; with ones for the latter, the input.
        total = torch.empty(layer.weight.shape, dtype=torch.float64, device=wide.device)
        add_weight_gradient(layer, wide, torch.ones_like(output, dtype=torch.float64), total, first=True)
        if layer.transposed:
            return total[:, :1].clone()
        groups: int = layer.groups
        return total[:: len(total) // groups].clone()
    if kept is not None and inputs.dim() == 3 and inputs.shape[:2] == kept.shape:
        wide = wide * kept[..., None].to(wide)
    features = wide.reshape(-1, wide.shape[-1]).sum(0)
    return features[None] if isinstance(layer, nn.Linear) else features[:, None]
