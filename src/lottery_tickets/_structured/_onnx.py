"""A model as an ONNX file, checked against the model it was made of."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lottery_tickets._atomic import replacing
from lottery_tickets._batches import evaluating
from lottery_tickets._structured._checking import relative_error, tensors_in
from lottery_tickets._structured._inputs import Arguments
from lottery_tickets.errors import MissingExtraError, StructureError

_TOLERANCE = 1e-4
_MOST_BYTES = 2**31 - 1  # a protobuf holds no more


def write_onnx(model: nn.Module, path: str | os.PathLike[str], inputs: Arguments) -> float:
    """Write the file, run it, and put it in its place; see `save_onnx`."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if size > _MOST_BYTES:
        raise StructureError(
            f"{type(model).__name__} holds {size:,} bytes of weights, and one ONNX file at most {_MOST_BYTES:,}. "
            "Load it in a type of two bytes, or remove more of it."
        )
    with replacing(path) as temporary, evaluating(model):
        _exported(model, inputs).save(str(temporary), external_data=False)
        expected = [one for one in tensors_in(model(*inputs[0], **inputs[1])) if one.is_floating_point()]
        error = relative_error(expected, _run(str(temporary), inputs))
        if error is None or not error <= _TOLERANCE:
            raise StructureError(
                f"ONNX Runtime does not compute what {type(model).__name__} does: "
                f"{'outputs of other shapes' if error is None else f'outputs off by {error:.2g} of the largest'}. "
                "Nothing was written."
            )
    return error


def _exported(model: nn.Module, inputs: Arguments) -> Any:
    args, kwargs = inputs
    shapes = (tuple(_free(one) for one in args), {name: _free(one) for name, one in kwargs.items()})
    with _quiet():
        try:
            return torch.onnx.export(
                model, args, kwargs=kwargs, dynamo=True, verbose=False, dynamic_shapes=shapes[0] or shapes[1]
            )
        except ImportError as error:
            raise MissingExtraError("onnxscript", "onnx") from error
        except Exception as error:
            # torch.onnx raises whatever the model's own code does when it cannot be followed.
            told = str(error.__cause__ or error).strip().splitlines()
            raise StructureError(
                f"{type(model).__name__} cannot be exported to ONNX: {told[0] if told else type(error).__name__}"
            ) from error


def _free(value: Any) -> Any:
    """Which sizes are left open: the number of samples, and of positions where tokens are numbers."""
    if not isinstance(value, torch.Tensor):
        return None
    free = 1 if value.is_floating_point() else 2
    return dict.fromkeys(range(min(free, value.dim())), torch.export.Dim.DYNAMIC)


def _run(path: str, inputs: Arguments) -> list[torch.Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    args, kwargs = inputs
    given = [one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)]
    names = [one.name for one in session.get_inputs()]
    fed = {name: one.cpu().numpy() for name, one in zip(names, given, strict=True)}
    return [torch.from_numpy(one) for one in session.run(None, fed)]


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter talks of its own steps and of what other libraries will deprecate."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
