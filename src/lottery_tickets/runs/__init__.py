"""What a run leaves on disk so that it can be killed at any moment and go on."""

from lottery_tickets.runs._encoding import Json, decoded, encoded
from lottery_tickets.runs._files import Scattered, Written, write_tensors
from lottery_tickets.runs._folder import RunFolder, State
from lottery_tickets.runs._random import RandomState, private_random_state, seed_everything

__all__ = [
    "Json",
    "RandomState",
    "RunFolder",
    "Scattered",
    "State",
    "Written",
    "decoded",
    "encoded",
    "private_random_state",
    "seed_everything",
    "write_tensors",
]
