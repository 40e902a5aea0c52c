"""Names of a mask, keys of a checkpoint's files: which is which, and what is stored twice."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from lottery_tickets.errors import MaskMismatchError
from lottery_tickets.large_models._checkpoints import Checkpoint, stored_blocks
from lottery_tickets.masks import PackedBits

# Data types whose zero is all bits zero, and their bytes a weight.
FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


def keys_of(shapes: Mapping[str, torch.Size], checkpoint: Checkpoint) -> dict[str, str]:
    """Name in the mask to key in the files, every tensor checked."""
    keys = located(list(shapes), checkpoint.tensors.keys())
    problems = []
    for name, shape in shapes.items():
        stored = checkpoint.tensors.get(keys.get(name, ""))
        if stored is None:
            problems.append(f"{name}: not stored under this name")
        elif stored.shape != shape:
            problems.append(f"{name}: mask {tuple(shape)}, stored {tuple(stored.shape)}")
        elif stored.dtype not in FLOAT_BYTES:
            problems.append(f"{name}: stored as {stored.dtype}, which is not a floating point type")
    if problems:
        listed = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise MaskMismatchError(
            f"The mask does not fit the files of {checkpoint.folder}: {listed}. If the mask was drawn from this "
            "checkpoint, the model fuses, quantizes or renames its weights while loading: load it, use "
            "apply_mask(model, mask), then model.save_pretrained(folder)."
        )
    return keys


def located(names: list[str], keys: Iterable[str]) -> dict[str, str]:
    """Keys for as many names as can be found; those not stored as they are must share one base-model prefix."""
    stored = set(keys)
    located = {name: name for name in names if name in stored}
    strays = [name for name in names if name not in stored]
    if not strays:
        return located
    without = {name: name.partition(".")[2] for name in strays}
    spellings = [without] if len({name.partition(".")[0] for name in strays}) == 1 else []
    prefixes = sorted({key.partition(".")[0] for key in stored})
    spellings += [{name: f"{prefix}.{name}" for name in strays} for prefix in prefixes]
    for spelling in spellings:
        if stored.issuperset(spelling.values()) and not spelling.values() & located.keys():
            return located | spelling
    return located


def twins_of(checkpoint: Checkpoint, masked: Mapping[str, PackedBits]) -> dict[str, str]:
    """Keys that hold a masked tensor once more, because it is tied; loading ties only what is still equal."""
    if not _ties_weights(checkpoint):
        return {}
    twins: dict[str, str] = {}
    for key in masked:
        if len(checkpoint.tensors[key].shape) > 1:
            twins |= {
                other: key
                for other in checkpoint.tensors
                if other not in masked and same_bytes(checkpoint, key, other)
            }
    return twins


def _ties_weights(checkpoint: Checkpoint) -> bool:
    config = checkpoint.config()
    # Ties are the default of older configurations, which do not mention them.
    return config is not None and bool(config.get("tie_word_embeddings", True))


def same_bytes(checkpoint: Checkpoint, key: str, other: str) -> bool:
    """Whether two stored tensors are the same, type, shape and bytes."""
    first, second = checkpoint.tensors[key], checkpoint.tensors[other]
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    blocks = (stored_blocks(checkpoint, tensor) for tensor in (first, second))
    return all(one == two for one, two in zip(*blocks, strict=True))
