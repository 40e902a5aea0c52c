"""Indices that stay or go together, as the nodes of a graph.

Every dimension of every parameter has a node for each of its indices. Reading the model's graph joins nodes whose
indices must leave together, pins those that cannot leave, and says which belong to channels, heads or neurons.
What is connected in the end is one unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lottery_tickets.masks import Kind

Nodes = npt.NDArray[np.int64]
Dims = tuple[Nodes | None, ...]


@dataclass(frozen=True)
class Value:
    """What is known of a tensor.

    Attributes:
        dims: For each dimension the nodes of its indices, or None where no index of it ever leaves.
        weight: Whether it is a parameter, perhaps transposed or cast, and not computed from the inputs.
    """

    dims: Dims
    weight: bool = False


@dataclass
class Indices:
    """The nodes, and what is known of them.

    Attributes:
        size: How many there are.
        joined: Pairs of arrays, node by node.
        pinned: Arrays, and why they cannot leave.
        made: Arrays of what a layer makes, and what kind of layer.
    """

    size: int = 0
    joined: list[tuple[Nodes, Nodes]] = field(default_factory=list)
    pinned: list[tuple[Nodes, str]] = field(default_factory=list)
    made: list[tuple[Nodes, Kind]] = field(default_factory=list)

    def new(self, count: int) -> Nodes:
        """New nodes."""
        self.size += count
        return np.arange(self.size - count, self.size, dtype=np.int64)

    def join(self, first: Nodes | None, second: Nodes | None, why: str) -> Nodes | None:
        """Let the indices of two dimensions leave together; pinned where one of them never leaves.

        Returns:
            The nodes of the dimension that both become.
        """
        if first is None or second is None:
            self.pin(first, why)
            self.pin(second, why)
            return None
        assert first.shape == second.shape, why
        self.joined.append((first, second))
        return first

    def pin(self, nodes: Nodes | None, why: str) -> None:
        """Keep these for good."""
        if nodes is not None:
            self.pinned.append((nodes, why))

    def pin_all(self, values: Iterable[Value], why: str) -> None:
        """Keep every index of these tensors for good."""
        for value in values:
            for nodes in value.dims:
                self.pin(nodes, why)

    def make(self, nodes: Nodes | None, kind: Kind) -> None:
        """Say that a layer makes these."""
        if nodes is not None:
            self.made.append((nodes, kind))

    def components(self) -> Nodes:
        """For each node the number of its component, in the order of their first nodes."""
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        if not self.size:
            return np.empty(0, np.int64)
        empty = np.empty(0, np.int64)
        first = np.concatenate([empty, *(first for first, _ in self.joined)])
        second = np.concatenate([empty, *(second for _, second in self.joined)])
        edges = coo_array((np.ones(first.size, np.int64), (first, second)), shape=(self.size, self.size))
        _, labels = connected_components(edges, directed=False)
        # Numbered by first appearance, whatever order scipy found them in.
        _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
        order = np.empty_like(firsts)
        order[np.argsort(firsts)] = np.arange(firsts.size)
        return order[inverse].astype(np.int64)
