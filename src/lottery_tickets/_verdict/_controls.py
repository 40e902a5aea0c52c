"""The networks that a ticket is compared with: which weights they start from, and which they keep."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import count
from typing import Literal, get_args

import numpy as np

from lottery_tickets.masks import Mask

Control = Literal["dense", "random_reinit", "random_mask", "layer_shuffled", "early_bird"]
CONTROLS: tuple[Control, ...] = get_args(Control)

# Each kind of draw has a stream of its own, so that no control's bits hang together with another's.
_REINIT, _MASK, _SHUFFLE = range(3)


def _drawn(seed: int, kind: int, attempt: int = 0) -> int:
    """A seed for one kind of draw: 31 bits, which every generator takes."""
    return int(np.random.SeedSequence((seed, kind, attempt)).generate_state(1)[0]) >> 1


def fresh_seed(seed: int, taken: Collection[int]) -> int:
    """The seed of weights that are nobody else's; the same for a seed whatever seeds stand beside it.

    Args:
        seed: Of the experiment.
        taken: Seeds of the other networks.
    """
    return next(one for attempt in count() if (one := _drawn(seed, _REINIT, attempt)) not in taken)


def random_mask(ticket: Mask, seed: int) -> Mask:
    """As many weights as the ticket in all, wherever they lie: random pruning."""
    return Mask.random_like(ticket, _drawn(seed, _MASK), per_layer=False)


def layer_shuffled(ticket: Mask, seed: int) -> Mask:
    """The ticket's bits at random places of the same tensor: its layer densities, and nothing else of it."""
    return Mask.random_like(ticket, _drawn(seed, _SHUFFLE))


# How the mask of a control comes from the ticket and a seed, where that needs no training.
MASKS: Mapping[str, Callable[[Mask, int], Mask | None]] = {
    "ticket": lambda ticket, _: ticket,
    "dense": lambda ticket, _: None,
    "random_reinit": lambda ticket, _: ticket,
    "random_mask": random_mask,
    "layer_shuffled": layer_shuffled,
}
