"""How far two masks are apart, and how far chance alone would put them."""

from __future__ import annotations

from fractions import Fraction

from lottery_tickets.errors import DetectionError, MaskMismatchError
from lottery_tickets.masks import Mask, count_different

# You et al. tell birds by 0.1; that is at most this share of chance at sparsities 0.3 to 0.7, which they prune to.
_DISTANCE = Fraction(1, 10)
_CHANCE_AT_EDGE = 2 * Fraction(3, 10) * Fraction(7, 10)


def differing_bits(mask: Mask, earlier: Mask) -> dict[str, int]:
    """Number of weights, by tensor, that one mask keeps and the other removes.

    Raises:
        MaskMismatchError: They do not speak of the same tensors.
    """
    if mask.shapes != earlier.shapes:
        unshared = sorted(mask.shapes.keys() ^ earlier.shapes.keys())
        reshaped = sorted(
            f"{name} {tuple(shape)}, before {tuple(earlier.shapes[name])}"
            for name, shape in mask.shapes.items()
            if name in earlier and earlier.shapes[name] != shape
        )
        raise MaskMismatchError(
            "A check compares the mask of the same tensors as the checks before it; only in one of the two: "
            f"{unshared or 'none'}; shapes differ: {reshaped or 'none'}. Use a new detector for another model."
        )
    return {name: count_different(mask.packed(name), earlier.packed(name)) for name in mask.names}


def chance_distance(sparsity: Fraction | float) -> Fraction:
    """Mean share of bits in which two random masks of this sparsity s differ: 2 s (1 - s)."""
    removed = _exactly(sparsity)
    return 2 * removed * (1 - removed)


def default_threshold(sparsity: Fraction | float) -> Fraction:
    """The distance below which masks of this sparsity s have settled: 0.1, scaled down where chance is smaller.

    `0.1 * min(1, 2 s (1 - s) / 0.42)`: between sparsities 0.3 and 0.7 the 0.1 of You et al., which is at most
    0.1 / 0.42 of the chance distance there; beyond, the same share of the chance distance.
    """
    return _DISTANCE * min(Fraction(1), chance_distance(sparsity) / _CHANCE_AT_EDGE)


def settled_threshold(asked: Fraction | None, sparsity: Fraction) -> Fraction:
    """The asked or the default threshold, if it tells settled masks of this sparsity from random ones.

    Raises:
        DetectionError: Random masks reach it, or masks of this sparsity are all the same.
    """
    chance, default = chance_distance(sparsity), default_threshold(sparsity)
    if not chance:
        raise DetectionError(
            f"Masks of sparsity {float(sparsity):.4g} keep all weights or none, so they cannot differ; draw them "
            "with a sparsity above 0 and below 1."
        )
    if asked is None:
        return default
    if asked >= chance:
        raise DetectionError(
            f"threshold {float(asked):.6g} is met by chance: two random masks of sparsity {float(sparsity):.4g} "
            f"differ by {float(chance):.6g} of their bits on average. The largest sensible threshold there is the "
            f"default, {float(default):.6g}."
        )
    return asked


def _exactly(number: Fraction | float) -> Fraction:
    """The number as the decimal that it is written as."""
    return number if isinstance(number, Fraction) else Fraction(str(number))
