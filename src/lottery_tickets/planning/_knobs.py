"""What would bring an operation under a limit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from lottery_tickets.planning._items import FROM_GRADIENTS, OPERATIONS, TRAINING
from lottery_tickets.planning._options import Options
from lottery_tickets.planning._shapes import Shapes

# Operations whose memory grows with the batch.
_BATCHED = (*TRAINING, *FROM_GRADIENTS, "quality", "robustness", "connectivity", "wanda", "grasp")
_LARGEST_BATCH = 1 << 20


class Knob(NamedTuple):
    """A setting that would take less.

    Attributes:
        setting: As it is written in a call.
        saved: Bytes that it saves where the operation computes.
    """

    setting: str
    saved: int


def knobs_of(operation: str, shapes: Shapes, options: Options, narrow: Shapes | None) -> list[Knob]:
    """Settings that would take less, each by itself, the one that saves the most first.

    Args:
        operation: A name of `OPERATIONS`.
        shapes: Of the model.
        options: As it would be run.
        narrow: The same model in bfloat16; None if it is in a type of two bytes already.
    """
    compute = OPERATIONS[operation]
    now = compute(shapes, options).total
    found = [
        Knob(name, now - compute(shapes, options.but(**change)).total)
        for name, change in _changes(operation, options)
    ]
    if narrow is not None:
        found.append(Knob("dtype='bfloat16'", now - compute(narrow, options).total))
    return sorted((one for one in found if one.saved > 0), key=lambda one: -one.saved)


def largest_batch(operation: str, shapes: Shapes, options: Options, limit: int) -> int | None:
    """Most samples that go through the model together within the limit; None where memory does not tell."""
    if operation not in _BATCHED or not OPERATIONS[operation](shapes, options).known:
        return None

    def fits(rows: int) -> bool:
        return OPERATIONS[operation](shapes, options.but(batch_size=rows, max_batch_size=None)).total <= limit

    low, high = 0, 1
    while high <= _LARGEST_BATCH and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _changes(operation: str, options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings as they are written, and as options."""
    if operation in TRAINING:
        yield "gradient_checkpointing=True", {"gradient_checkpointing": True}
        if options.rows > 1:
            yield "max_batch_size=1", {"max_batch_size": 1}
        yield "optimizer='sgd'", {"optimizer": "sgd"}
        yield "optimizer='adamw8bit'", {"optimizer": "adamw8bit"} if "adam" in options.optimizer else {}
        yield "momentum=0.0", {"momentum": 0.0}
        yield "precision='stochastic'", {"precision": "stochastic"}
    if operation == "iterative":
        yield "run_dir='...'", {"on_disk": True}
    if operation in FROM_GRADIENTS:
        yield "checkpoint_activations=True", {"gradient_checkpointing": True}
        yield "store='disk'", {"store": "disk"}
    if operation in _BATCHED and operation not in TRAINING and options.rows > 1:
        yield "batch_size=1", {"batch_size": 1}
    if operation in ("mask", "robustness"):
        yield "use_histogram=True", {"use_histogram": True}
    if operation in ("mask", "quality", "wanda"):
        yield "from_disk=True", {"from_disk": True}
