"""Bytes of every operation, item by item, before it starts; and what is free."""

from lottery_tickets.planning._amounts import amount_of, shown
from lottery_tickets.planning._bytes import ITEMS
from lottery_tickets.planning._configs import ShippedConfig, shipped_config, shipped_names
from lottery_tickets.planning._guard import (
    refuse_if_too_large,
    refuse_training_if_too_large,
    sizes_of,
    unchecked,
)
from lottery_tickets.planning._items import OPERATIONS
from lottery_tickets.planning._knobs import Knob
from lottery_tickets.planning._limits import FreeMemory, free_memory
from lottery_tickets.planning._plan import MemoryPlan, plan_memory
from lottery_tickets.planning._shapes import Shapes

__all__ = [
    "ITEMS",
    "OPERATIONS",
    "FreeMemory",
    "Knob",
    "MemoryPlan",
    "Shapes",
    "ShippedConfig",
    "amount_of",
    "free_memory",
    "plan_memory",
    "refuse_if_too_large",
    "refuse_training_if_too_large",
    "shipped_config",
    "shipped_names",
    "shown",
    "sizes_of",
    "unchecked",
]
