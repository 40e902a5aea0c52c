"""Activations that are made again on the way back instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from lottery_tickets.errors import TrainingError

Checkpointing = bool | Literal["auto"]


@contextmanager
def checkpointed(model: nn.Module, checkpointing: Checkpointing = "auto") -> Iterator[bool]:
    """Gradient checkpointing inside the block, by the model's own means where it has them.

    A transformers model is asked to (`gradient_checkpointing_enable`, not reentrant); it does so in training mode
    only, and where it does already it is left alone. Of any other model the members of its module lists are
    checkpointed, in every mode, but for those that keep running statistics of their inputs. Either way the model
    is as before afterwards.

    Args:
        model: Any module.
        checkpointing: "auto" where there is something to checkpoint; True is an error where there is not; False
            changes nothing.

    Yields:
        Whether activations are checkpointed.

    Raises:
        TrainingError: Another value, or True for a model with nothing to checkpoint.
    """
    if checkpointing not in (True, False, "auto"):
        raise TrainingError(f"gradient_checkpointing is 'auto', True or False; got {checkpointing!r}.")
    if checkpointing is False:
        yield False
    elif _is_checkpointing(model):
        yield True
    elif getattr(model, "supports_gradient_checkpointing", False):
        with _by_its_own_means(model):
            yield True
    else:
        blocks = [block for block in blocks_of(model) if not _counts(block)]
        if not blocks and checkpointing is True:
            raise TrainingError(
                f"{type(model).__name__} has no module list with members that could be checkpointed (running "
                "statistics, as of batch normalisation, would count each batch twice); 'auto' goes on without."
            )
        with checkpointed_blocks(blocks):
            yield bool(blocks)


@contextmanager
def checkpointed_blocks(blocks: Sequence[Any]) -> Iterator[None]:
    """These modules' activations are made again on the way back, inside the block."""
    try:
        for block in blocks:
            # An attribute of the instance hides the method of the class until it is deleted.
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def blocks_of(model: nn.Module) -> list[Any]:
    """The outermost members of the model's module lists: the layers of a transformer."""
    found: list[Any] = []

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(one for one in child if "forward" not in vars(one))
            else:
                walk(child)

    walk(model)
    return list(dict.fromkeys(found))


def _counts(block: nn.Module) -> bool:
    """Whether a second forward pass would change its buffers."""
    return any(getattr(module, "track_running_stats", False) for module in block.modules())


def _is_checkpointing(model: nn.Module) -> bool:
    # The name until transformers' version 5 warns where the later one is there.
    now = getattr(model, "is_activation_checkpointing", None)
    return bool(getattr(model, "is_gradient_checkpointing", False) if now is None else now)


@contextmanager
def _by_its_own_means(model: Any) -> Iterator[None]:
    """A transformers model's own checkpointing, and whatever it sets, put back."""
    kept = [
        (module, {name: vars(module)[name] for name in _SET if name in vars(module)}) for module in model.modules()
    ]
    # Its name until version 5, and the one that takes over.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
        yield
    finally:
        if vars(model).keys() & _HOOKS:  # where there are none, version 4 fails
            model.disable_input_require_grads()
        for module, values in kept:
            for name in _SET:
                vars(module).pop(name, None)
            vars(module).update(values)


_HOOKS = {"_require_grads_hooks", "_require_grads_hook"}
_SET = ("gradient_checkpointing", "_gradient_checkpointing_func", *sorted(_HOOKS))
