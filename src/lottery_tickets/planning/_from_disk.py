"""What a model holds in memory whose weights stay in a checkpoint's folder, and that computes block by block."""

from __future__ import annotations

import re
from collections import Counter

from lottery_tickets.planning._options import Options
from lottery_tickets.planning._shapes import Shapes

# Members of a module list carry their number in their name.
_BLOCK = re.compile(r"(.*?\.\d+)\.")


def masked_bytes(shapes: Shapes) -> int:
    """Masked copies of the weights of one block, or of those outside of blocks, whichever are more."""
    blocks: Counter[str] = Counter()
    for name, numel in shapes.prunable.items():
        found = _BLOCK.match(name)
        blocks[found[1] if found else ""] += numel
    return shapes.width * max(blocks.values(), default=0)


def waiting_bytes(shapes: Shapes, options: Options, sides: int) -> int:
    """Hidden states between two blocks, of all batches, for the dense model and the tickets."""
    if shapes.decoder is None:
        return 0
    return sides * options.batches * options.tokens * shapes.decoder.hidden * shapes.width
