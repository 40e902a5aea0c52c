"""One seed for every random stream, and algorithms that give the same bits each time."""

from __future__ import annotations

import os
import random

import numpy as np
import torch


def ensure_deterministic_pruning(seed: int, *, warn_only: bool = False) -> torch.Generator:
    """Seed Python, numpy and torch on every device, and have torch use deterministic algorithms only.

    Drawing a mask is deterministic without this: ties are broken by position, on any number of threads. What
    needs it is what comes before, training and scores from gradients. The hashes of strings cannot be changed in
    a running process: start it with PYTHONHASHSEED set if an order hangs on them.

    Sets `torch.use_deterministic_algorithms`, `torch.backends.cudnn`, and the environment variable
    CUBLAS_WORKSPACE_CONFIG if it is not set, which counts if CUDA has not been used before.

    Args:
        seed: Integer in [0, 2^32).
        warn_only: Where torch has no deterministic algorithm, warn instead of raising RuntimeError.

    Returns:
        A generator of its own with the same seed, for `DataLoader(..., shuffle=True, generator=generator)`: the
        order of the data then does not depend on what else draws random numbers.

    Raises:
        ValueError: A seed outside that range.

    Example:
        >>> import torch
        >>> from lottery_tickets import ensure_deterministic_pruning
        >>> generator = ensure_deterministic_pruning(7)
        >>> first = torch.rand(2), torch.randperm(5, generator=generator)
        >>> generator = ensure_deterministic_pruning(7)
        >>> second = torch.rand(2), torch.randperm(5, generator=generator)
        >>> all(torch.equal(a, b) for a, b in zip(first, second))
        True
        >>> torch.use_deterministic_algorithms(False)
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise ValueError(f"A seed is an integer from 0 to 2^32 - 1, got {seed!r}.")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return torch.Generator().manual_seed(seed)
