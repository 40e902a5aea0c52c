"""What is to be the same on every rank, looked at before anybody builds on it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError
from lottery_tickets.masks import Mask, ShardedMask
from lottery_tickets.training._joined import lies_in_parts
from lottery_tickets.training._snapshots import digest_of, tensors_of


def check_alike(ranks: Ranks, configuration: Mapping[str, Any], model: nn.Module) -> None:
    """Raise DistributedError where ranks begin with other arguments or other weights than rank 0."""
    if ranks.size == 1:
        return
    first, *others = ranks.gather(json.loads(json.dumps(configuration)))
    for rank, other in enumerate(others, 1):
        different = [key for key in first if other.get(key) != first[key]]
        if different:
            raise DistributedError(
                f"Ranks 0 and {rank} were called with different {', '.join(different)}. Give all ranks the same "
                "arguments, and data of the same length."
            )
    if not lies_in_parts(model):
        _compare(ranks, digest_of(tensors_of(model)), "begin with different weights", "Seed or load them alike")


def check_masks_alike(ranks: Ranks, masks: Sequence[Mask | ShardedMask]) -> None:
    """Raise DistributedError where ranks draw other masks than rank 0."""
    if ranks.size > 1:
        told = ", ".join(mask.digest() for mask in masks)
        _compare(ranks, told, "draw different masks", "Something on one of them has changed its weights alone")


def _compare(ranks: Ranks, digest: str, what: str, remedy: str) -> None:
    there = ranks.gather(digest)
    other = next((rank for rank, one in enumerate(there) if one != there[0]), None)
    if other is not None:
        raise DistributedError(f"Ranks 0 and {other} {what}: {there[0]} and {there[other]}. {remedy}.")
