"""Activations of any architecture: a run on the meta device, where tensors have sizes and no numbers."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lottery_tickets.planning._models import on_meta
from lottery_tickets.training import checkpointed

_ATTENTION = functional.scaled_dot_product_attention
_TURNS = threading.Lock()


_MANY = 1 << 12

Pass = Literal["forward", "scores", "training"]


class Peak(NamedTuple):
    """Bytes at the worst moment over what is there before, and how many classes each token is told among."""

    bytes: int
    words: int


class Trace:
    """Peaks of a model's passes over what is there before, by rows of a batch.

    At some moment what does not hang on the batch is the most, the gradient of an embedding say, and for more rows
    it is another, at which memory grows with them: a run of one row tells the first, two of many the second.

    Args:
        model: On any device; it is not touched.
        scored: Names of the parameters that have gradients where scores are made.
    """

    def __init__(self, model: nn.Module, scored: Collection[str]) -> None:
        self._model, self._scored = model, frozenset(scored)
        self._seen: dict[tuple[int, Pass, bool], tuple[Peak, ...] | None] = {}

    def peak(self, rows: int, length: int, what: Pass, *, checkpointing: bool = False) -> Peak | None:
        """The worst moment, gradients of parameters gone as they come; None of what cannot run without numbers."""
        key = (length, what, checkpointing)
        if key not in self._seen:
            self._seen[key] = self._run(*key)
        found = self._seen[key]
        if found is None:
            return None
        one, many, double = found
        growing = many.bytes + (rows - _MANY) * (double.bytes - many.bytes) // _MANY
        return Peak(max(one.bytes, growing), one.words)

    def _run(self, length: int, what: Pass, checkpointing: bool) -> tuple[Peak, ...] | None:
        try:
            model = on_meta(self._model).train(what == "training")
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(what == "training" or (what == "scores" and name in self._scored))
            with checkpointed(model, "auto" if checkpointing else False):
                runs = [_peak(model, rows, length, backward=what != "forward") for rows in (1, _MANY, 2 * _MANY)]
        except Exception:  # a model raises whatever it happens to run into
            return None
        found = tuple(one for one in runs if one is not None)
        return found if len(found) == len(runs) else None


def _peak(model: nn.Module, rows: int, length: int, *, backward: bool) -> Peak | None:
    inputs = _inputs(model, rows, length)
    if inputs is None:
        return None
    kept = [one for one in model.parameters() if one.requires_grad]
    handles = [
        one.register_post_accumulate_grad_hook(_forget)  # type: ignore[no-untyped-call]
        for one in kept
    ]
    live = _Live()
    with torch.set_grad_enabled(backward), _fused_attention(), _WithoutNumbers(), live:
        output = _first(model(**inputs))
        if backward:
            output.backward(torch.empty_like(output))  # type: ignore[no-untyped-call]
    for handle in handles:
        handle.remove()
    return Peak(live.peak, output.shape[-1])


def _forget(parameter: torch.Tensor) -> None:
    parameter.grad = None


def _inputs(model: nn.Module, rows: int, length: int) -> Mapping[str, Any] | None:
    """A batch for a transformers model of words or of images; None for any other."""
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    if name == "input_ids":
        ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
        return {name: ids} | ({"use_cache": False} if getattr(config, "use_cache", False) else {})
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
    if name == "pixel_values" and isinstance(side, int) and isinstance(channels, int):
        width = next(model.parameters()).dtype
        return {name: torch.zeros(rows, channels, side, side, dtype=width, device="meta")}
    return None


def _first(output: Any) -> torch.Tensor:
    if isinstance(output, torch.Tensor):
        return output
    return next(one for one in output.values() if isinstance(one, torch.Tensor))


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that were made inside and are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                self._add(one.untyped_storage(), given)
        self.peak = max(self.peak, self._now)
        return made

    def _add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        number = id(storage)  # a storage keeps its Python object as long as it lives
        if number in self._known or number in given:
            return
        self._known.add(number)
        self._now += storage.nbytes()
        weakref.finalize(storage, self._drop, number, storage.nbytes())

    def _drop(self, number: int, count: int) -> None:
        self._known.discard(number)
        self._now -= count


class _WithoutNumbers(TorchFunctionMode):
    """A model that looks whether its input is as usual, padded or packed by no one, finds that it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return True if func is torch.Tensor.__bool__ else func(*args, **(kwargs or {}))


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Attention as torch's fused kernels do it, which keep no scores; on the meta device torch would make them.

    Of tensors elsewhere nothing changes. A mode would not see what is computed again on the way back.
    """

    def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dropout = kwargs.get("dropout_p") or args[1:2] not in ((), (0.0,))
        if query.is_meta and not dropout:
            return _Attention.apply(query, key, value)  # type: ignore[no-untyped-call]
        return _ATTENTION(query, key, value, *args, **kwargs)

    with _TURNS:
        functional.scaled_dot_product_attention = attention
        try:
            yield
        finally:
            functional.scaled_dot_product_attention = _ATTENTION


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])
