"""How an operation is run, as far as memory hangs on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from lottery_tickets.errors import PlanError

Optimizer = Literal["sgd", "adam", "adamw", "adamw8bit", "torch sgd", "torch adamw"]
PlanStore = Literal["cpu", "disk", "device"]
PlanCriterion = Literal["window", "queue", "rank_correlation"]
PlanPrecision = Literal["stochastic", "compensated", "nearest"]


@dataclass(frozen=True)
class Options:
    """See `plan_memory`.

    Raises:
        PlanError: A value that is not known, or a number out of range.
    """

    batch_size: int = 1
    sequence_length: int = 512
    optimizer: str = "sgd"
    device: str = "cpu"
    gradient_checkpointing: bool | None = None
    max_batch_size: int | None = None
    momentum: float = 0.0
    precision: str = "stochastic"
    criterion: str = "window"
    store: str = "cpu"
    masks: int = 1
    use_histogram: bool = True
    from_disk: bool = False
    batches: int = 1
    on_disk: bool = False
    rewind_later: bool = False

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        known = {
            "optimizer": Optimizer,
            "store": PlanStore,
            "criterion": PlanCriterion,
            "precision": PlanPrecision,
        }
        for name, values in known.items():
            value = getattr(self, name)
            if value not in get_args(values):
                raise PlanError(f"{name} is one of {', '.join(get_args(values))}; got {value!r}.")
        counts = {"batch_size": self.batch_size, "sequence_length": self.sequence_length, "masks": self.masks}
        if isinstance(self.batches, bool) or not isinstance(self.batches, int) or self.batches < 0:
            raise PlanError(f"batches is a number of batches; got {self.batches!r}.")
        if self.max_batch_size is not None:
            counts["max_batch_size"] = self.max_batch_size
        for name, count in counts.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise PlanError(f"{name} is a positive integer; got {count!r}.")

    def but(self, **changes: Any) -> Options:
        """The same with some changes."""
        return replace(self, **changes)

    @property
    def rows(self) -> int:
        """Samples that go through the model together."""
        return min(self.batch_size, self.max_batch_size or self.batch_size)

    @property
    def tokens(self) -> int:
        """That go through the model together."""
        return self.rows * self.sequence_length

    @property
    def elsewhere(self) -> bool:
        """Whether the operation computes on an accelerator, which has memory of its own."""
        return self.device != "cpu"
