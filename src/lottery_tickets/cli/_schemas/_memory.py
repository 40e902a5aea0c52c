"""Plans of memory."""

from __future__ import annotations

from typing import TypedDict


class PlannedKnob(TypedDict):
    """A setting that would take less.

    Attributes:
        setting: In words.
        saved: Bytes.
    """

    setting: str
    saved: int


class PlannedMemory(TypedDict):
    """Memory of an operation, before it starts.

    Attributes:
        operation: What is planned.
        model: What it is done to.
        dtype: Of the weights.
        device: Where it computes.
        batch_size: Samples that go through the model together.
        sequence_length: Tokens of each.
        turns: Bytes by which the items exceed the total, for some come when others are gone.
        complete: Whether all is counted; where it is not, the total is the least.
        traced: Whether activations are an estimate from a run on the meta device.
        limit: Bytes that there are; null if nobody said.
        fits: Whether it is within the limit; null where that cannot be told.
        bytes: Item to bytes, and "total".
        host_bytes: Item to bytes in the machine's memory, where an accelerator computes.
        largest_batch: Most samples that fit together; null where that cannot be told.
        knobs: What would take less.
    """

    operation: str
    model: str
    dtype: str
    device: str
    batch_size: int
    sequence_length: int
    turns: int
    complete: bool
    traced: bool
    limit: int | None
    fits: bool | None
    bytes: dict[str, int]
    host_bytes: dict[str, int]
    largest_batch: int | None
    knobs: list[PlannedKnob]


class PlanResults(TypedDict):
    """Plans of operations.

    Attributes:
        plans: Each of them.
        largest_batches: With --batches: operation to tokens to the largest batch.
    """

    plans: list[PlannedMemory]
    largest_batches: dict[str, dict[str, int | None]]
