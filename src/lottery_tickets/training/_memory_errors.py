"""Memory that ran out, told from other errors."""

from __future__ import annotations

import torch

# What torch's allocators on the CPU and other back ends say in a plain RuntimeError.
_SIGNS = ("not enough memory", "can't allocate memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was no memory to give."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)
