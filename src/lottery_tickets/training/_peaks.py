"""The most memory that there was."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def devices_of(model: nn.Module) -> list[torch.device]:
    """Where its parameters are."""
    return list(dict.fromkeys(parameter.device for parameter in model.parameters()))


def peak_bytes(model: nn.Module) -> int | None:
    """The most bytes so far: of torch's allocations on the model's accelerators, else resident in this process.

    Nothing is reset, so that whoever measures from outside sees the same. None where the system does not say.
    """
    accelerators = [device for device in devices_of(model) if device.type == "cuda"]
    if accelerators:
        return sum(torch.cuda.max_memory_allocated(device) for device in accelerators)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not Linux
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)
