"""Every batch shared out among ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from lottery_tickets._batches import batches_of, samples_of, size_of
from lottery_tickets._ranks import Ranks


class SharedBatches:
    r"""This rank's samples of every batch of a dataloader that all ranks go through alike.

    Of a batch of b samples rank r of n takes $\lfloor rb/n \rfloor$ to $\lfloor (r+1)b/n \rfloor - 1$: all samples
    once and none twice. What is computed of all shares is therefore what one process computes of the whole batch,
    and a run goes on with the same batches on another number of ranks. Each rank reads the whole batch; where that
    costs too much, give each rank a loader of its own in place of this.

    Args:
        dataloader: Batches of any usual form, or one batch; the same on every rank, in the same order. Loops of
            this library see to the order of those that shuffle.
        process_group: The ranks; None for this process alone, which takes all.

    Attributes:
        dataloader: As it was given.
        processes: How many share it.

    Raises:
        BatchError: No batches.
        DistributedError: This process is not in the group.

    Example:
        >>> import torch
        >>> from lottery_tickets.training import SharedBatches
        >>> batches = [(torch.arange(5.0)[:, None], torch.arange(5))]
        >>> [labels.tolist() for _, labels in SharedBatches(batches)]
        [[0, 1, 2, 3, 4]]
    """

    def __init__(self, dataloader: Any, process_group: dist.ProcessGroup | None = None) -> None:
        self.dataloader = batches_of(dataloader)
        # Their numbers, and not the group: gloo may abort a process that still has one when it ends.
        ranks = Ranks(process_group)
        self._rank, self.processes = ranks.rank, ranks.size

    def __len__(self) -> int:
        return len(self.dataloader)  # type: ignore[arg-type]  # the loader's own error where it has none

    def __iter__(self) -> Iterator[Any]:
        rank, processes = self._rank, self.processes
        for batch in self.dataloader:
            size = size_of(batch)
            yield samples_of(batch, size * rank // processes, size * (rank + 1) // processes)
