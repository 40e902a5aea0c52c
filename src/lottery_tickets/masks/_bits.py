"""Eight decisions a byte: the first weight in the lowest bit, bits beyond the last weight zero."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

PackedBits = npt.NDArray[np.uint8]

# Long enough that a block's work hides the interpreter, short enough that its temporaries stay small.
BLOCK = 1 << 20


def packed_size(numel: int) -> int:
    """Bytes that `numel` bits take."""
    return (numel + 7) // 8


def pack(decisions: torch.Tensor) -> PackedBits:
    """Pack a bool tensor on the CPU, row-major."""
    return np.packbits(decisions.contiguous().view(-1).numpy(), bitorder="little")


def unpack(packed: PackedBits, shape: torch.Size) -> torch.Tensor:
    """Bool tensor of `shape` that shares no memory with the packed bits."""
    bits = np.unpackbits(packed, count=shape.numel(), bitorder="little")
    return torch.from_numpy(bits.view(np.bool_)).view(shape)


def unpack_range(packed: PackedBits, start: int, stop: int) -> torch.Tensor:
    """Bits [start, stop) as a flat bool tensor; `start` is a multiple of 8."""
    bits = np.unpackbits(packed[start // 8 : packed_size(stop)], count=stop - start, bitorder="little")
    return torch.from_numpy(bits.view(np.bool_))


def unpack_there(packed: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Bool tensor of `shape` from packed bits that lie in a tensor, on its device."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> places) & 1
    return bits.view(-1)[: shape.numel()].bool().view(shape)


def count(packed: PackedBits) -> int:
    """Number of set bits."""
    return sum(_count_words(packed[start : start + BLOCK]) for start in range(0, packed.size, BLOCK))


def count_common(first: PackedBits, second: PackedBits) -> int:
    """Number of bits set in both."""
    return sum(
        _count_words(first[start : start + BLOCK] & second[start : start + BLOCK])
        for start in range(0, first.size, BLOCK)
    )


def count_different(first: PackedBits, second: PackedBits) -> int:
    """Number of bits set in one and not in the other."""
    return sum(
        _count_words(first[start : start + BLOCK] ^ second[start : start + BLOCK])
        for start in range(0, first.size, BLOCK)
    )


def _count_words(packed: PackedBits) -> int:
    """Number of set bits, eight bytes at a time."""
    whole = packed.size // 8 * 8
    words, rest = packed[:whole].view(np.uint64), packed[whole:]
    return int(np.bitwise_count(words).sum(dtype=np.int64)) + int(np.bitwise_count(rest).sum(dtype=np.int64))


def has_bits_beyond(packed: PackedBits, numel: int) -> bool:
    """Whether a bit after the last weight is set."""
    return numel % 8 != 0 and bool(packed[-1] >> (numel % 8))


def clear_bits_beyond(packed: PackedBits, numel: int) -> None:
    """Zero the bits after the last weight, in place."""
    if numel % 8:
        packed[-1] &= (1 << (numel % 8)) - 1
