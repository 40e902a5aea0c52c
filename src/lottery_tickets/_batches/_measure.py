"""A batch of any usual form and a model, to a loss sum and what it is a sum over.

Forms of a batch: a mapping (a dict or transformers' `BatchEncoding`) with `labels`, or `(inputs, targets)` where
inputs are a tensor, a mapping or several tensors. A causal language model's mapping may lack `labels`: the
`input_ids` are then predicted. Labels of a mapping follow transformers: where they repeat the `input_ids` they are
predicted one position earlier. Targets of a pair follow torch: they stand where they are predicted. Models may
return an object or a mapping with `loss` and `logits`, a tensor, or a tuple of them. Padding is where
`attention_mask` is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn

from lottery_tickets._batches import _conventions as conventions
from lottery_tickets._batches._calls import (
    Output,
    Request,
    call,
    described,
    is_pair,
    request_of,
    size_of,
    with_decoder_inputs,
)
from lottery_tickets._batches._in_step import in_step as ranks_in_step
from lottery_tickets._batches._losses import (
    BatchLoss,
    class_loss,
    multi_label_loss,
    next_token_loss,
    plain_loss,
    regression_loss,
    shifted,
    total,
)
from lottery_tickets._batches._units import IGNORED, rows_of, widened
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import BatchError, EvaluationError

Precision = Literal["high", "fast"]
LossFunction = Callable[[Any, Any], torch.Tensor]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluation mode without gradients; every submodule's own `training` flag comes back afterwards."""
    # Flags are set one by one: a module's own train() may do more, such as merging adapters into weights.
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        with torch.no_grad():
            yield model
    finally:
        for module, training in flags:
            module.training = training


def measure(
    model: nn.Module, batch: Any, *, precision: Precision = "high", loss_fn: LossFunction | None = None
) -> BatchLoss:
    """Loss of one batch, in the mode the model is in.

    Where gradients are on, `graph` of the result is its loss sum with its graph, `rows` the loss of each sample.

    Args:
        model: Any module; the batch is moved to its device, and floating-point inputs to its dtype.
        batch: See the module's docstring.
        precision: "high" computes losses from float32 logits, chunk by chunk; "fast" in the logits' dtype. A loss
            that the model itself computes is taken as it comes.
        loss_fn: `loss_fn(logits, targets)` in place of the loss above. `logits` is the model's output, or what
            stands under `logits` in it; `targets` is the batch's labels, as they came (not shifted) or None.
            Returns a scalar, the mean over the labels other than -100 (over the samples if targets are not
            integers), or losses with one dimension or more, which are the units themselves.

    Raises:
        BatchError: A batch or an output of another form; the message says what came.
    """
    request = request_of(model, batch)
    base = conventions.unwrapped(model)
    convention, high = conventions.convention_of(base), precision == "high"
    if loss_fn is not None:
        return _loss_by(loss_fn, call(model, with_decoder_inputs(base, convention, request)), request)
    if request.labels is None:
        return _loss_without_labels(model, base, request, high=high)
    if request.aligned:
        logits = _fitting(call(model, request).logits_for(request), request.labels)
        return class_loss(logits, request.labels, high=high, tokens=True)
    if convention == "own":
        return _own_loss(model, base, request, high=high)
    logits = call(model, with_decoder_inputs(base, convention, request)).logits_for(request)
    return _conventional_loss(convention, base, logits, request, high=high)


def run(model: nn.Module, batch: Any) -> None:
    """Call the model on a batch, for what happens inside; labels are not needed."""
    request, base = request_of(model, batch), conventions.unwrapped(model)
    call(model, with_decoder_inputs(base, conventions.convention_of(base), request))


def output_of(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The logits, or the one tensor that the model gives, for its main input as it comes."""
    base = conventions.unwrapped(model)
    name = getattr(base, "main_input_name", None) if conventions.is_transformers(base) else None
    request = Request((), {name: inputs}, None, len(inputs)) if name else Request((inputs,), {}, None, len(inputs))
    output = call(model, request)
    return output.logits_for(request)


def kept_positions(model: nn.Module, batch: Any) -> torch.Tensor | None:
    """(B, T) bool on the model's device, where the batch is not padding; None where it does not say."""
    mask = request_of(model, batch).kwargs.get("attention_mask")
    return mask != 0 if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None


def measure_mean(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    precision: Precision = "high",
    loss_fn: LossFunction | None = None,
    ranks: Ranks | None = None,
    in_step: bool = False,
) -> BatchLoss:
    """All batches as one, the model in evaluation mode for the time; `.mean` is the loss.

    With `ranks` each of them brings batches of its own, any number, and all learn what all measured. Where a pass
    is one of all ranks, as through a model in parts, they go `in_step`.

    Raises:
        EvaluationError: No batches, or none with a label.
        BatchError: A batch of an unknown form.
    """
    ranks = ranks or Ranks()
    there = with_samples(batches, ranks)
    losses = []
    with evaluating(model), ranks.watched("Measuring") if in_step else nullcontext():
        for batch, counts in ranks_in_step(there, ranks) if in_step else ((one, True) for one in there):
            part = measure(model, batch, precision=precision, loss_fn=loss_fn)
            if counts:
                losses.append(part)
    parts = [one for one in ranks.gather(total(losses)) if one.samples]
    whole = total(parts)
    if not whole.units:
        raise EvaluationError(
            "There is nothing to measure: " + ("every label is ignored." if parts else "no batches came.")
        )
    return whole


def with_samples(batches: Iterable[Any], ranks: Ranks) -> Iterator[Any]:
    """Batches without those that are a rank's share of fewer samples than ranks, and empty."""
    return (batch for batch in batches if ranks.size == 1 or size_of(batch))


def batches_of(batch_or_loader: Any) -> Iterable[Any]:
    """A dataloader as it is, a single batch as a dataloader of one.

    A mapping is a batch, and so is a tuple or list of two whose second is a tensor and whose first is a tensor, a
    mapping or several tensors. Anything else that can be iterated is a dataloader.

    Raises:
        BatchError: Neither.
    """
    if isinstance(batch_or_loader, torch.Tensor) or not isinstance(batch_or_loader, Iterable):
        raise BatchError(f"Expected a batch or an iterable of batches, got {described(batch_or_loader)}.")
    if isinstance(batch_or_loader, Mapping) or is_pair(batch_or_loader):
        return [batch_or_loader]
    return batch_or_loader


def check_precision(precision: str) -> None:
    """Raise EvaluationError for an unknown precision."""
    if precision not in get_args(Precision):
        raise EvaluationError(
            f"precision_mode is 'high' (float32 logits) or 'fast' (the model's dtype), got {precision!r}."
        )


def _conventional_loss(
    convention: str, base: Any, logits: torch.Tensor, request: Request, *, high: bool
) -> BatchLoss:
    labels = request.labels
    assert labels is not None
    if convention == "sequence class":
        kind = conventions.problem_type(base.config, labels)
        if kind == "regression":
            return regression_loss(logits, labels)
        if kind == "multi_label_classification":
            return multi_label_loss(logits, labels, high=high)
        return class_loss(_fitting(logits, labels.flatten()), labels.flatten(), high=high)
    if convention == "decoder":
        labels = _without_padding(labels, request.kwargs.get("decoder_attention_mask"))
        return class_loss(_fitting(logits, labels), labels, high=high, tokens=True)
    mask = request.kwargs.get("attention_mask")
    if convention == "next token":
        return _next_token_loss(_fitting(logits, labels), labels, mask, high=high)
    labels = _without_padding(labels, mask)
    return class_loss(_fitting(logits, labels), labels, high=high, tokens=convention == "token")


def _loss_without_labels(model: nn.Module, base: nn.Module, request: Request, *, high: bool) -> BatchLoss:
    tokens = request.kwargs.get("input_ids")
    output = call(model, request)
    if conventions.is_causal_language_model(base) and isinstance(tokens, torch.Tensor):
        logits = _fitting(output.logits_for(request), tokens)
        return _next_token_loss(logits, tokens, request.kwargs.get("attention_mask"), high=high)
    if output.loss is None:
        raise BatchError(
            f"The batch has no 'labels', {type(base).__name__} is not known for a causal language model and gave "
            f"no loss of its own; the batch is {described(request.kwargs)}."
        )
    return _scaled(output.loss, request.samples, request)


def _own_loss(model: nn.Module, base: nn.Module, request: Request, *, high: bool) -> BatchLoss:
    """The loss the model computes itself if it takes labels, else one told by the labels' type and shape."""
    labels = request.labels
    assert labels is not None
    if not request.args and conventions.accepts(base, "labels"):
        output = call(model, request, labels=labels)
        if output.loss is not None:
            part = _scaled(output.loss, _units(labels, request), request)
            logits, classes = output.logits, labels.dim() == 1 and not labels.is_floating_point()
            if classes and logits is not None and logits.dim() == 2:
                return replace(part, correct=class_loss(_fitting(logits, labels), labels, high=high).correct)
            return replace(part, tokens=conventions.is_causal_language_model(base))
    else:
        output = call(model, request)
        if output.loss is not None and output.logits is None:
            return _scaled(output.loss, _units(labels, request), request)
    return _loss_by_shape(output.logits_for(request), labels, request, high=high)


def _loss_by_shape(logits: torch.Tensor, labels: torch.Tensor, request: Request, *, high: bool) -> BatchLoss:
    tokens, mask = request.kwargs.get("input_ids"), request.kwargs.get("attention_mask")
    if isinstance(tokens, torch.Tensor) and tokens.shape == labels.shape:
        labelled = labels != IGNORED
        if bool((tokens == labels)[labelled].all()):
            return _next_token_loss(_fitting(logits, labels), labels, mask, high=high)
        labels = _without_padding(labels, mask)
    return plain_loss(logits, labels, high=high)


def _loss_by(loss_fn: LossFunction, output: Output, request: Request) -> BatchLoss:
    losses = loss_fn(output.whole if output.logits is None else output.logits, request.labels)
    if not isinstance(losses, torch.Tensor) or not losses.is_floating_point():
        raise BatchError(
            "loss_fn returns a tensor, the mean loss or one loss per unit; got "
            f"{described(losses)}{f' of {losses.dtype}' if isinstance(losses, torch.Tensor) else ''}."
        )
    if not losses.dim():
        return _scaled(losses, _units(request.labels, request), request)
    rows = rows_of(losses, None, request.samples) if losses.shape[0] == request.samples else None
    loss_sum = float(losses.detach().cpu().sum(dtype=torch.float64))
    return BatchLoss(loss_sum, losses.numel(), request.samples, by_sample=rows, graph=losses.sum())


def _next_token_loss(
    logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, *, high: bool
) -> BatchLoss:
    """Next-token loss where neither the token nor the position that predicts it is padding."""
    if mask is None or mask.dim() != 2:
        return next_token_loss(logits, labels, high=high)
    predicted = shifted(_without_padding(labels, mask))
    return class_loss(logits, _without_padding(predicted, mask), high=high, tokens=True)


def _without_padding(labels: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    # A mask of four dimensions says who attends to whom, not what is padding.
    if mask is None or mask.dim() != 2:
        return labels
    if mask.shape != labels.shape:
        raise BatchError(
            f"attention_mask {tuple(mask.shape)} and labels {tuple(labels.shape)} must have one shape."
        )
    return labels.masked_fill(mask.to(labels.device) == 0, IGNORED)


def _fitting(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if logits.shape[:-1] != labels.shape:
        raise BatchError(
            f"Logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}; expected a row of logits "
            "for each label. Give loss_fn for another loss."
        )
    return logits


def _scaled(mean: torch.Tensor, units: int, request: Request) -> BatchLoss:
    if mean.numel() != 1:
        raise BatchError(f"The model's loss has shape {tuple(mean.shape)}; expected one number, the mean.")
    # The mean over no labels is NaN, and they add nothing.
    loss_sum = float(mean.detach()) * units if units else 0.0
    # A mean over several samples does not tell them apart.
    rows = rows_of(mean.reshape(1), None, 1) if units and request.samples == 1 else None
    graph = widened(mean.reshape(()), high=True) * units if units else None
    return BatchLoss(loss_sum, units, request.samples, by_sample=rows, graph=graph)


def _units(labels: torch.Tensor | None, request: Request) -> int:
    if labels is None or labels.is_floating_point():
        return request.samples
    return int((labels != IGNORED).sum())
