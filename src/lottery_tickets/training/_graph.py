"""What autograd's graph says before anybody goes back through it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")


def uses_of(root: Any, leaves: Mapping[int, _T]) -> Counter[_T]:
    """How many operations of a graph take each leaf.

    Args:
        root: The `grad_fn` of what is gone back from.
        leaves: `id` of a tensor that requires gradients, to what it is called in the result.
    """
    uses: Counter[_T] = Counter()
    if root is None:
        return uses
    seen, stack = {root}, [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            if hasattr(node, "variable"):
                name = leaves.get(id(node.variable))
                if name is not None:
                    uses[name] += 1
            elif node not in seen:
                seen.add(node)
                stack.append(node)
    return uses
