"""Losses unit by unit, with their graph, and what they come to for each sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

IGNORED = -100

# Logits are looked at in pieces of this size: a vocabulary of 150,000 makes a full copy of them a gigabyte.
_CHUNK_BYTES = 16 << 20
_FEW_BYTES = 1 << 20

Drawn = Callable[[torch.Generator], torch.Tensor]


@dataclass(frozen=True, eq=False)
class SampleLosses:
    """The loss of each sample: the mean over its own units.

    Attributes:
        losses: (samples,), with their graph; 0 for a sample without units.
        counted: (samples,) bool, whether the sample has units.
        drawn: The same losses against labels that the given generator draws from the model's own output; None
            where what the output says of the labels is not known.
    """

    losses: torch.Tensor
    counted: torch.Tensor
    drawn: Drawn | None = None


def rows_of(
    losses: torch.Tensor, targets: torch.Tensor | None, samples: int, drawn: Drawn | None = None
) -> Callable[[], SampleLosses] | None:
    """Units in row-major order, those of one sample side by side, as a mean for each sample.

    Args:
        losses: One for each unit, 0 where it does not count.
        targets: For each unit; those that are ignored do not count. None if all do.
        samples: Rows of the batch.
        drawn: Makes other losses of the same units.

    Returns:
        What computes them, as few ask for them; None where gradients are off or the units do not divide into
        samples.
    """
    if not torch.is_grad_enabled() or not samples or losses.numel() % samples:
        return None
    return partial(_rows, losses, targets, samples, drawn)


def _rows(losses: torch.Tensor, targets: torch.Tensor | None, samples: int, drawn: Drawn | None) -> SampleLosses:
    each = losses.numel() // samples
    units = torch.full((samples,), each, device=losses.device)
    if targets is not None:
        units = (targets != IGNORED).reshape(samples, -1).sum(1)

    def mean(units_losses: torch.Tensor) -> torch.Tensor:
        return units_losses.reshape(samples, -1).sum(1) / units.clamp(min=1)

    again = None if drawn is None else lambda generator: mean(drawn(generator))
    return SampleLosses(mean(losses), units > 0, again)


def cross_entropies(
    logits: torch.Tensor, targets: torch.Tensor, *, high: bool, count_right: bool
) -> tuple[torch.Tensor, int | None]:
    """Cross entropy of each target, flat and 0 where ignored, and how many logits are largest at their target.

    Logits (..., C) are read in chunks and never copied whole; neither are their probabilities kept for the
    backward pass, which makes them again. A few are left to autograd, which is faster.
    """
    right = 0 if count_right else None
    if right is not None:
        for chunk, labels in _chunks(logits.detach(), targets):
            right += int((chunk.argmax(-1) == labels).sum())
    if logits.numel() * 4 <= _FEW_BYTES:
        wide = widened(logits.reshape(-1, logits.shape[-1]), high=high)
        return F.cross_entropy(wide, targets.reshape(-1), reduction="none", ignore_index=IGNORED), right
    losses: torch.Tensor = _CrossEntropies.apply(logits, targets, high)  # type: ignore[no-untyped-call]
    return losses, right


def draw_classes(logits: torch.Tensor, targets: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Classes drawn from softmax(logits) wherever the target is not ignored, one uniform number for each."""
    drawn = []
    for chunk, labels in _chunks(logits.detach(), targets):
        heights = torch.rand(labels.numel(), generator=generator, dtype=torch.float64).to(chunk.device)
        sums = chunk.double().softmax(-1).cumsum(-1)
        chosen = torch.searchsorted(sums, heights[:, None] * sums[:, -1:]).squeeze(-1)
        drawn.append(torch.where(labels == IGNORED, labels, chosen.clamp(max=logits.shape[-1] - 1)))
    return torch.cat(drawn).reshape(targets.shape) if drawn else targets


class _CrossEntropies(torch.autograd.Function):
    """Cross entropy chunk by chunk in both directions; twice differentiable."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, high: bool) -> torch.Tensor:
        ctx.save_for_backward(logits, targets)
        ctx.high = high
        losses = [
            F.cross_entropy(widened(chunk, high=high), labels, reduction="none", ignore_index=IGNORED)
            for chunk, labels in _chunks(logits, targets)
        ]
        return torch.cat(losses) if losses else widened(logits, high=high).new_zeros(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets = ctx.saved_tensors
        if torch.is_grad_enabled():
            # For a second derivative autograd has to see the whole.
            wide = widened(logits.reshape(-1, logits.shape[-1]), high=ctx.high)
            whole = _gradient(wide, targets.reshape(-1), grad_outputs[0])
            return whole.to(logits.dtype).view_as(logits), None, None
        gradients, start = torch.empty_like(logits, memory_format=torch.contiguous_format), 0
        rows = gradients.view(-1, logits.shape[-1])
        for chunk, labels in _chunks(logits, targets):
            stop = start + labels.numel()
            rows[start:stop] = _gradient(widened(chunk, high=ctx.high), labels, grad_outputs[0][start:stop])
            start = stop
        return gradients, None, None


def _gradient(logits: torch.Tensor, labels: torch.Tensor, above: torch.Tensor) -> torch.Tensor:
    """Of the losses' sum, weighted by `above`, with respect to rows of logits."""
    ignored = labels == IGNORED
    scales = above.masked_fill(ignored, 0).unsqueeze(-1)
    there = labels.masked_fill(ignored, 0).unsqueeze(-1)
    return (logits.softmax(-1) * scales).scatter_add(-1, there, -scales)


def _chunks(logits: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of logits and their labels, some at a time."""
    classes = logits.shape[-1]
    if logits.dim() > 2 and not logits.is_contiguous():
        for sample, own in zip(logits, labels, strict=True):
            yield from _chunks(sample, own)
        return
    rows, flat = logits.reshape(-1, classes), labels.reshape(-1)
    step = max(1, _CHUNK_BYTES // (4 * classes))
    for start in range(0, flat.numel(), step):
        yield rows[start : start + step], flat[start : start + step]


def widened(values: torch.Tensor, *, high: bool) -> torch.Tensor:
    """In float32 at least, if asked for."""
    return values.float() if high and values.dtype.itemsize < torch.float32.itemsize else values
