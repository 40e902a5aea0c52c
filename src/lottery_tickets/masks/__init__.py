"""What a ticket is: the mask, its file, the parameters it speaks of, and a model that computes with it."""

from lottery_tickets._dtensors import is_sharded, local_of
from lottery_tickets.masks._applied import applied, apply_mask, masked_copy, remove_mask
from lottery_tickets.masks._bits import (
    PackedBits,
    count_common,
    count_different,
    pack,
    packed_size,
    unpack,
    unpack_range,
)
from lottery_tickets.masks._held import held, zero_held
from lottery_tickets.masks._mask import Mask, as_mask
from lottery_tickets.masks._parameters import (
    Patterns,
    Place,
    chosen_parameters,
    is_transposed_linear,
    lasting,
    matching_names,
    parameter_aliases,
    parameters_of,
    places_of,
    prunable_parameters,
)
from lottery_tickets.masks._sharded import ShardedMask
from lottery_tickets.masks._shards import Division, Shard, reshard, runs_of, shard_of, unsharded_class
from lottery_tickets.masks._units import (
    Kept,
    Kind,
    Part,
    UnitGroup,
    Units,
    left_of,
    readable_metadata,
    units_metadata,
)

__all__ = [
    "Division",
    "Kept",
    "Kind",
    "Mask",
    "PackedBits",
    "Part",
    "Patterns",
    "Place",
    "Shard",
    "ShardedMask",
    "UnitGroup",
    "Units",
    "applied",
    "apply_mask",
    "as_mask",
    "chosen_parameters",
    "count_common",
    "count_different",
    "held",
    "is_sharded",
    "is_transposed_linear",
    "lasting",
    "left_of",
    "local_of",
    "masked_copy",
    "matching_names",
    "pack",
    "packed_size",
    "parameter_aliases",
    "parameters_of",
    "places_of",
    "prunable_parameters",
    "readable_metadata",
    "remove_mask",
    "reshard",
    "runs_of",
    "shard_of",
    "units_metadata",
    "unpack",
    "unpack_range",
    "unsharded_class",
    "zero_held",
]
