"""What came as a batch, as one call of the model, and what the model said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from lottery_tickets._batches import _conventions as conventions
from lottery_tickets._batches._units import IGNORED
from lottery_tickets.errors import BatchError


@dataclass(frozen=True)
class Request:
    """One call of the model, and what it is held against."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    labels: torch.Tensor | None
    samples: int
    aligned: bool = False  # labels of a causal language model that already stand where they are predicted


def request_of(model: nn.Module, batch: Any) -> Request:
    device, dtype = _device_and_dtype(model)
    if isinstance(batch, Mapping):
        kwargs = dict(batch)
        labels = kwargs.pop("labels", None)
        request = _by_name(kwargs, labels)
    elif is_pair(batch):
        request = _from_pair(conventions.unwrapped(model), *batch)
    else:
        raise _unknown(batch)
    labels = None if request.labels is None else request.labels.to(device)
    args, kwargs = _moved(request.args, device, dtype), _moved(request.kwargs, device, dtype)
    return Request(args, kwargs, labels, request.samples, request.aligned)


class Inputs(NamedTuple):
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def inputs_of(model: nn.Module, batch: Any) -> Inputs:
    """The inputs in a batch of any form, on the model's device, without its labels."""
    request = request_of(model, batch)
    return Inputs(request.args, request.kwargs)


def _by_name(kwargs: dict[str, Any], labels: Any) -> Request:
    if labels is not None and not isinstance(labels, torch.Tensor):
        raise BatchError(f"labels is {described(labels)}; expected a tensor.")
    tensors = [value for value in kwargs.values() if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        raise BatchError(f"A mapping holds the model's inputs as tensors by name; got {described(kwargs)}.")
    samples = labels if labels is not None and labels.dim() else tensors[0]
    return Request((), kwargs, labels, samples.shape[0])


def _from_pair(model: nn.Module, inputs: Any, targets: torch.Tensor) -> Request:
    if isinstance(inputs, Mapping):
        if inputs.get("labels") is not None:
            raise BatchError("Labels came twice: as 'labels' among the inputs and as the second of the pair.")
        return _by_name({name: value for name, value in inputs.items() if name != "labels"}, targets)
    samples = targets.shape[0] if targets.dim() else 1
    if not isinstance(inputs, torch.Tensor):
        return Request(tuple(inputs), {}, targets, samples)
    if not conventions.is_transformers(model):
        return Request((inputs,), {}, targets, samples)
    kwargs = {getattr(model, "main_input_name", "input_ids"): inputs}
    if not conventions.is_causal_language_model(model):
        return Request((), kwargs, targets, samples)
    return Request((), kwargs, targets, samples, aligned=_are_aligned(inputs, targets))


def _are_aligned(tokens: torch.Tensor, targets: torch.Tensor) -> bool:
    """Whether the targets of a pair are the next tokens (True) or the tokens themselves (False)."""
    if tokens.shape == targets.shape and not targets.is_floating_point():
        labelled = targets != IGNORED
        if bool((tokens == targets)[labelled].all()):
            return False
        if bool((tokens[:, 1:] == targets[:, :-1])[labelled[:, :-1]].all()):
            return True
    raise BatchError(
        f"The pair {described((tokens, targets))} for a causal language model: the second is neither the tokens "
        "nor the tokens that follow. Give a mapping with 'input_ids', 'attention_mask' and 'labels' instead."
    )


def is_pair(batch: Any) -> bool:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], torch.Tensor):
        return False
    inputs = batch[0]
    several = isinstance(inputs, (tuple, list)) and inputs and all(isinstance(one, torch.Tensor) for one in inputs)
    return isinstance(inputs, (torch.Tensor, Mapping)) or bool(several)


def _device_and_dtype(model: nn.Module) -> tuple[torch.device, torch.dtype | None]:
    """Where inputs go, and the one floating-point type of the parameters if they share one."""
    # Without names, which take longer to make up than a small network's layers to compute.
    parameters = [one for module in model.modules() for one in module._parameters.values() if one is not None]
    first = parameters[0] if parameters else next(model.buffers(), None)
    dtypes = {parameter.dtype for parameter in parameters if parameter.is_floating_point()}
    return torch.device("cpu") if first is None else first.device, dtypes.pop() if len(dtypes) == 1 else None


def _moved(value: Any, device: torch.device, dtype: torch.dtype | None) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {name: _moved(one, device, dtype) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        moved = [_moved(one, device, dtype) for one in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value


def size_of(batch: Any) -> int:
    """Samples of a batch of any form."""
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        return _by_name({name: value for name, value in batch.items() if name != "labels"}, labels).samples
    if not is_pair(batch):
        raise _unknown(batch)
    return batch[1].shape[0] if batch[1].dim() else 1


def samples_of(batch: Any, start: int, stop: int) -> Any:
    """Samples [start, stop) of a batch of any form: of every tensor as long as the batch, its rows."""
    return _rows(batch, size_of(batch), start, stop)


def _rows(value: Any, size: int, start: int, stop: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[start:stop] if value.dim() and value.shape[0] == size else value
    if isinstance(value, Mapping):
        return {name: _rows(one, size, start, stop) for name, one in value.items()}
    if isinstance(value, (tuple, list)):
        rows = [_rows(one, size, start, stop) for one in value]
        return type(value)(*rows) if hasattr(value, "_fields") else type(value)(rows)
    return value


@dataclass(frozen=True)
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor | None
    whole: Any

    def logits_for(self, request: Request) -> torch.Tensor:
        if self.logits is None:
            raise BatchError(f"The model gave neither logits nor a loss to compare: {described(self.whole)}.")
        if request.labels is not None and not self.logits.dim():
            raise BatchError("The model gave one number where logits were expected.")
        return self.logits


def call(model: nn.Module, request: Request, **extra: Any) -> Output:
    base = conventions.unwrapped(model)
    if conventions.is_transformers(base) and conventions.accepts(base, "use_cache"):
        extra.setdefault("use_cache", request.kwargs.get("use_cache", False))
    result = model(*request.args, **{**request.kwargs, **extra})
    if isinstance(result, torch.Tensor):
        values: list[Any] = [result]
    elif isinstance(result, (tuple, list)):
        values = list(result)
    else:
        found = [
            result.get(name) if isinstance(result, Mapping) else getattr(result, name, None)
            for name in ("loss", "logits")
        ]
        loss, logits = (one if isinstance(one, torch.Tensor) else None for one in found)
        return Output(loss, logits, result)
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    loss = next((tensor for tensor in tensors if not tensor.dim()), None)
    return Output(loss, next((tensor for tensor in tensors if tensor.dim()), None), result)


def with_decoder_inputs(base: Any, convention: str, request: Request) -> Request:
    """The request with the decoder's inputs, which an encoder-decoder would make from its labels."""
    if convention != "decoder" or request.labels is None:
        return request
    if {"decoder_input_ids", "decoder_inputs_embeds"} & request.kwargs.keys():
        return request
    decoder_inputs = base.prepare_decoder_input_ids_from_labels(labels=request.labels)
    return replace(request, kwargs={**request.kwargs, "decoder_input_ids": decoder_inputs})


def _unknown(batch: Any) -> BatchError:
    return BatchError(
        "A batch is a mapping, such as {'input_ids': ..., 'labels': ...}, or a pair (inputs, targets) of "
        f"tensors; got {described(batch)}."
    )


def described(value: Any) -> str:
    """Types and shapes, short enough for a message."""
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {sorted(map(str, value))}"
    if isinstance(value, (tuple, list)):
        inside = ", ".join(described(one) for one in value[:4]) + (", ..." if len(value) > 4 else "")
        return f"{type(value).__name__} of {len(value)} ({inside})"
    return type(value).__name__
