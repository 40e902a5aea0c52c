"""Losses as numbers that add: sums over tokens or samples, and how many there were."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch.nn import functional as F

from lottery_tickets._batches._units import IGNORED, SampleLosses, cross_entropies, draw_classes, rows_of, widened
from lottery_tickets.errors import BatchError


@dataclass(frozen=True)
class BatchLoss:
    """What a batch adds to a measurement.

    Attributes:
        loss_sum: Sum of the losses of all units.
        units: What the loss is a mean over: tokens, labels, elements of a regression target, or samples.
        samples: Rows of the batch.
        correct: Units whose largest logit is the label; None where labels are not classes.
        tokens: The loss is nats per token of a sequence, so its exponential is a perplexity.
        by_sample: Computes `rows`, where gradients are on and the loss is known by sample.
        graph: `loss_sum` as a tensor, with its graph where gradients are on; may be None without units.
    """

    loss_sum: float
    units: int
    samples: int
    correct: int | None = None
    tokens: bool = False
    by_sample: Callable[[], SampleLosses] | None = field(default=None, compare=False, repr=False)
    graph: torch.Tensor | None = field(default=None, compare=False, repr=False)

    @cached_property
    def rows(self) -> SampleLosses | None:
        """The loss of each sample with its graph."""
        return None if self.by_sample is None else self.by_sample()

    @property
    def mean(self) -> float:
        """Loss per unit; NaN without units."""
        return self.loss_sum / self.units if self.units else math.nan

    @property
    def accuracy(self) -> float | None:
        """Share of the units that are correct."""
        return self.correct / self.units if self.correct is not None and self.units else None


def total(parts: Sequence[BatchLoss]) -> BatchLoss:
    """Several batches as one, each weighing as many units as it has; without graphs."""
    if len(parts) == 1:
        only = parts[0]
        bare = only.graph is None and only.by_sample is None
        return only if bare else replace(only, by_sample=None, graph=None)
    correct = [part.correct for part in parts if part.correct is not None]
    return BatchLoss(
        loss_sum=math.fsum(part.loss_sum for part in parts),
        units=sum(part.units for part in parts),
        samples=sum(part.samples for part in parts),
        correct=sum(correct) if parts and len(correct) == len(parts) else None,
        tokens=bool(parts) and all(part.tokens for part in parts),
    )


def class_loss(
    logits: torch.Tensor, labels: torch.Tensor, *, high: bool, tokens: bool = False, samples: int | None = None
) -> BatchLoss:
    """Cross entropy of labels against logits whose last dimension is the classes.

    Args:
        logits: (..., C); read in chunks, never copied whole.
        labels: (...) of integers below C; -100 is ignored.
        high: Compute in float32 at least, else in the dtype of the logits.
        tokens: The labels are words of a vocabulary: a perplexity, no accuracy.
        samples: Rows of the batch, if not the length of the labels.
    """
    ignored = _check_classes(labels, logits.shape[-1])
    targets = labels.to(logits.device, torch.int64)
    losses, right = cross_entropies(logits, targets, high=high, count_right=not tokens)
    rows = labels.shape[0] if samples is None else samples
    return BatchLoss(
        loss_sum=_sum(losses),
        units=labels.numel() - ignored,
        samples=rows,
        correct=right,
        tokens=tokens,
        by_sample=rows_of(
            losses,
            targets,
            rows,
            drawn=lambda generator: cross_entropies(
                logits, draw_classes(logits, targets, generator), high=high, count_right=False
            )[0],
        ),
        graph=losses.sum(),
    )


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, *, high: bool) -> BatchLoss:
    """Cross entropy of a causal language model: logits (B, T, V) at t against labels (B, T) at t + 1."""
    return class_loss(logits, shifted(labels), high=high, tokens=True)


def shifted(labels: torch.Tensor) -> torch.Tensor:
    """Labels (B, T) moved one position to the left, where their prediction stands; nothing follows the last."""
    # Moving the labels, not the logits, leaves the logits contiguous.
    return F.pad(labels[..., 1:], (0, 1), value=IGNORED)


def regression_loss(outputs: torch.Tensor, targets: torch.Tensor) -> BatchLoss:
    """Squared error per element; shapes are equal but for a trailing 1, and nothing is broadcast."""
    if outputs.shape != targets.shape:
        outputs, targets = _without_trailing_one(outputs), _without_trailing_one(targets)
    if outputs.shape != targets.shape:
        raise BatchError(
            "Floating-point targets are compared element by element (mean squared error), so shapes must be "
            f"equal: outputs {tuple(outputs.shape)}, targets {tuple(targets.shape)}; loss_fn takes any."
        )
    wide = widened(outputs, high=True)
    losses = F.mse_loss(wide, targets.to(outputs.device).float(), reduction="none")
    samples = targets.shape[0] if targets.dim() else 1

    def drawn(generator: torch.Generator) -> torch.Tensor:
        # Squared error is the log-likelihood of a normal variable around the output whose variance is 1/2.
        noise = torch.randn(wide.shape, generator=generator).to(wide) * math.sqrt(0.5)
        return F.mse_loss(wide, wide.detach() + noise, reduction="none")

    rows = rows_of(losses, None, samples, drawn)
    return BatchLoss(_sum(losses), losses.numel(), samples, by_sample=rows, graph=losses.sum())


def multi_label_loss(logits: torch.Tensor, labels: torch.Tensor, *, high: bool) -> BatchLoss:
    """Binary cross entropy per element of logits and labels of one shape."""
    if logits.shape != labels.shape:
        raise BatchError(
            f"Multi-label targets have the shape of the logits {tuple(logits.shape)}, got {tuple(labels.shape)}."
        )
    wide = widened(logits, high=high)
    losses = F.binary_cross_entropy_with_logits(wide, labels.to(wide), reduction="none")

    def drawn(generator: torch.Generator) -> torch.Tensor:
        heads = torch.rand(wide.shape, generator=generator).to(wide) < wide.detach().sigmoid()
        return F.binary_cross_entropy_with_logits(wide, heads.to(wide), reduction="none")

    samples = labels.shape[0]
    rows = rows_of(losses, None, samples, drawn)
    return BatchLoss(_sum(losses), losses.numel(), samples, by_sample=rows, graph=losses.sum())


def plain_loss(logits: torch.Tensor, targets: torch.Tensor, *, high: bool) -> BatchLoss:
    """Loss of a plain PyTorch model, told by the targets' type and shape.

    Floating-point targets: squared error. Integers: cross entropy, of logits (B, C) against (B,); (B, T, C)
    against (B, T), a sequence of tokens; or torch's (B, C, ...) against (B, ...).
    """
    if targets.is_floating_point():
        return regression_loss(logits, targets)
    if targets.dtype == torch.bool or targets.is_complex():
        raise BatchError(f"Targets are class numbers or floating-point values, got {targets.dtype}. Give loss_fn.")
    last = logits.dim() > 1 and logits.shape[:-1] == targets.shape
    second = logits.dim() > 2 and (logits.shape[0], *logits.shape[2:]) == tuple(targets.shape)
    if last == second:
        reason = "classes may stand in the last or in the second dimension" if last else "they do not fit"
        raise BatchError(
            f"Outputs {tuple(logits.shape)} against class numbers {tuple(targets.shape)}: {reason}. Expected "
            "(B, C) and (B,), (B, T, C) and (B, T), or (B, C, ...) and (B, ...); give loss_fn for anything else."
        )
    if second:
        return class_loss(logits.movedim(1, -1), targets, high=high)
    return class_loss(logits, targets, high=high, tokens=targets.dim() > 1)


def _sum(losses: torch.Tensor) -> float:
    # On the CPU, because not every accelerator has float64.
    return float(losses.detach().cpu().sum(dtype=torch.float64))


def _without_trailing_one(values: torch.Tensor) -> torch.Tensor:
    return values.squeeze(-1) if values.dim() > 1 else values


def _check_classes(labels: torch.Tensor, classes: int) -> int:
    """Raise BatchError for what is no class; how many labels are ignored."""
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise BatchError(f"Class labels are integers, got {labels.dtype}.")
    if not labels.numel():
        return 0
    least, most = (int(one) for one in torch.aminmax(labels))
    if least >= 0 and most < classes:
        return 0
    ignored = labels == IGNORED
    strange = ((labels < 0) & ~ignored) | (labels >= classes)
    if bool(strange.any()):
        found = labels[strange].flatten()[0].item()
        raise BatchError(
            f"A label is {found}, but the model has {classes} classes: 0 ... {classes - 1} (-100 is ignored)."
        )
    return int(ignored.sum())
