"""Bytes of an operation, item by item."""

from __future__ import annotations

from dataclasses import dataclass, field

ITEMS = ("weights", "gradients", "optimizer", "activations", "logits", "mask", "scores", "rewind", "temporaries")


@dataclass
class Bytes:
    """What an operation takes.

    Attributes:
        device: Item to bytes where it computes.
        host: Item to bytes in the machine's memory, where that is another.
        turns: What of the device's items is never there at one time: those that come when others are gone.
        known: Whether all is counted; else it takes at least this.
        traced: Whether activations come from a run on the meta device.
    """

    device: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ITEMS, 0))
    host: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ITEMS, 0))
    turns: int = 0
    known: bool = True
    traced: bool = False

    def add(self, item: str, count: int, *, to_host: bool = False) -> None:
        """More bytes of an item."""
        (self.host if to_host else self.device)[item] += count

    @property
    def total(self) -> int:
        """The most at one time, where it computes."""
        return sum(self.device.values()) - self.turns
