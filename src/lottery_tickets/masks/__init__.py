"""What a ticket is: the mask, its file, the parameters it speaks of, and a model that computes with it."""

from lottery_tickets.masks._applied import applied, apply_mask, remove_mask
from lottery_tickets.masks._bits import PackedBits, count_common, count_different, pack, packed_size, unpack_range
from lottery_tickets.masks._held import held, zero_held
from lottery_tickets.masks._mask import Mask, as_mask
from lottery_tickets.masks._parameters import (
    Patterns,
    chosen_parameters,
    is_transposed_linear,
    lasting,
    matching_names,
    parameter_aliases,
    parameters_of,
    places_of,
    prunable_parameters,
)
from lottery_tickets.masks._units import Kept, Kind, Part, UnitGroup, Units, left_of, units_metadata

__all__ = [
    "Kept",
    "Kind",
    "Mask",
    "PackedBits",
    "Part",
    "Patterns",
    "UnitGroup",
    "Units",
    "applied",
    "apply_mask",
    "as_mask",
    "chosen_parameters",
    "count_common",
    "count_different",
    "held",
    "is_transposed_linear",
    "lasting",
    "left_of",
    "matching_names",
    "pack",
    "packed_size",
    "parameter_aliases",
    "parameters_of",
    "places_of",
    "prunable_parameters",
    "remove_mask",
    "units_metadata",
    "unpack_range",
    "zero_held",
]
