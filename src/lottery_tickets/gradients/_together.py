"""What passes through one model have to do with those of other ranks: nothing, or all of it.

Ranks that have the model whole go through samples of their own and meet when sums are made. Where `fully_shard`
has cut it up, a pass of one is a pass of all: each brings its own batch, or one that does not count, and every
layer is put together for the time in which it computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lottery_tickets._batches import SampleLosses, in_step, samples_of, size_of
from lottery_tickets._ranks import Ranks
from lottery_tickets.errors import DistributedError
from lottery_tickets.gradients._plan import Seen
from lottery_tickets.gradients._taps import MisfitError
from lottery_tickets.masks import reshard


class NotBySampleError(Exception):
    """One loss came for several samples."""


class Together:
    """Ranks, each of which has the model whole.

    Attributes:
        ranks: Those that go through samples of their own.
        always: Whether a pass without a sample that counts is made all the same.
    """

    always = False

    def __init__(self, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()

    def batches(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """Batches, and whether they are this rank's own."""
        return ((batch, True) for batch in batches)

    def rows(self, batch: Any) -> Iterator[tuple[Any, bool]]:
        """The samples of a batch one by one, and whether each is one of this rank's own."""
        return ((samples_of(batch, row, row + 1), True) for row in range(size_of(batch)))

    def passing(self, *, forward: bool = True) -> AbstractContextManager[None]:
        """The time of a pass, forward or back."""
        return nullcontext()

    def watching(self, others: Mapping[str, Sequence[nn.Parameter]]) -> AbstractContextManager[None]:
        """The time in which passes are made that autograd gives these parameters gradients in."""
        return nullcontext()

    def agreed(self, seen: Seen | None, parameters: int) -> Seen | None:
        """What all ranks see of so many parameters; some may have had a sample without a label."""
        return seen

    def agreed_losses(self, found: SampleLosses | NotBySampleError | MisfitError) -> SampleLosses:
        """The losses.

        Raises:
            NotBySampleError: A rank has none by sample.
            MisfitError: A layer on some rank has no sample in each row.
        """
        if isinstance(found, SampleLosses):
            return found
        raise found

    def reaching(self, losses: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses from which the way back leads through the model, and their weights."""
        return losses, weights

    def present(self, others: Mapping[str, Sequence[nn.Parameter]]) -> Mapping[str, Sequence[nn.Parameter]]:
        """The parameters as they are in a pass."""
        return others


class InStep(Together):
    """Ranks of a model that `fully_shard` has cut up.

    Args:
        ranks: All of the job.
        model: Any module whose parameters are all sharded over them.
    """

    always = True

    def __init__(self, ranks: Ranks, model: nn.Module) -> None:
        super().__init__(ranks)
        self._model = model
        self._whole: dict[int, nn.Parameter] = {}
        self._output: torch.Tensor | None = None

    def batches(self, batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
        """As many on every rank."""
        return in_step(batches, self.ranks)

    def rows(self, batch: Any) -> Iterator[tuple[Any, bool]]:
        """As many on every rank, the last one again where another has more."""
        size = size_of(batch)
        for row in range(max(self.ranks.gather(size))):
            one = min(row, size - 1)
            yield samples_of(batch, one, one + 1), row == one

    @contextmanager
    def passing(self, *, forward: bool = True) -> Iterator[None]:
        """The same; an error in the middle cannot be heard by those that wait for this rank's weights.

        One of what comes after the model's forward pass, its loss, can.
        """
        if forward:
            # What is left whole would not be told of flags that have changed.
            reshard(self._model)
        came_through: list[bool] = []
        handle = self._model.register_forward_hook(lambda *_: came_through.append(True))
        heard: Exception | None = None
        try:
            with self.ranks.watched("A pass through a model in parts"):
                try:
                    yield
                except Exception as error:
                    if not came_through:
                        raise
                    heard = error
        finally:
            handle.remove()
        if heard is not None:
            raise heard

    @contextmanager
    def watching(self, others: Mapping[str, Sequence[nn.Parameter]]) -> Iterator[None]:
        """The same; what is whole for the time of a pass is noted, and what the model gives."""
        wanted = {id(one) for ones in others.values() for one in ones}
        handles = [self._model.register_forward_hook(self._note_output)]
        for owner, places in self._places(wanted).items():
            handles.append(owner.register_forward_hook(self._note(places), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._whole, self._output = {}, None

    def agreed(self, seen: Seen | None, parameters: int) -> Seen | None:
        """What all taps agree on; the rest is left to autograd."""
        reshard(self._model)
        told = [one for one in self.ranks.gather(seen) if one is not None]
        if not told:
            return None
        tapped = frozenset.intersection(*(one.tapped for one in told))
        return Seen(tapped, any(one.singly for one in told) or len(tapped) < parameters)

    def agreed_losses(self, found: SampleLosses | NotBySampleError | MisfitError) -> SampleLosses:
        """The same, an error of one being one of all."""
        kinds = self.ranks.gather(None if isinstance(found, SampleLosses) else type(found).__name__)
        if NotBySampleError.__name__ in kinds:
            raise NotBySampleError
        if MisfitError.__name__ in kinds:
            raise MisfitError("a layer")
        return super().agreed_losses(found)

    def reaching(self, losses: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The model's output, times nothing, where a batch without labels has no loss of it."""
        if losses.requires_grad or self._output is None:
            return losses, weights
        return self._output, torch.zeros_like(self._output)

    def present(self, others: Mapping[str, Sequence[nn.Parameter]]) -> Mapping[str, Sequence[nn.Parameter]]:
        """Those that stand in the place of the sharded ones."""
        return {name: [self._whole.get(id(one), one) for one in ones] for name, ones in others.items()}

    def _places(self, wanted: Collection[int]) -> dict[nn.Module, list[tuple[nn.Module, str, int]]]:
        """For each module that puts parameters together, where the wanted ones of them stand."""
        from torch.distributed.fsdp import FSDPModule

        owners: dict[nn.Module, nn.Module] = {}
        for owner in self._model.modules():
            if isinstance(owner, FSDPModule):
                owners.update(dict.fromkeys(owner.modules(), owner))
        found: dict[nn.Module, list[tuple[nn.Module, str, int]]] = {}
        for module, owner in owners.items():
            for key, one in module._parameters.items():
                if id(one) in wanted:
                    found.setdefault(owner, []).append((module, key, id(one)))
        return found

    def _note(self, places: Sequence[tuple[nn.Module, str, int]]) -> Any:
        def hook(*_: Any) -> None:
            for module, key, sharded in places:
                one = module._parameters[key]
                assert one is not None
                self._whole[sharded] = one

        return hook

    def _note_output(self, _module: nn.Module, _args: Any, output: Any) -> None:
        tensors = (one for one in tree_leaves(output) if isinstance(one, torch.Tensor) and one.requires_grad)
        self._output = next(tensors, None)


def refuse_other_parts(model: nn.Module) -> None:
    """Refuse models in parts whose passes do not put whole weights together.

    Raises:
        DistributedError: With the remedy.
    """
    from torch.distributed.fsdp import FSDPModule

    owned = {id(one) for owner in model.modules() if isinstance(owner, FSDPModule) for one in owner.parameters()}
    for name, one in model.named_parameters():
        if id(one) not in owned:
            raise DistributedError(
                f"{name} is a DTensor that fully_shard has not made, so no rank ever sees what its whole gradient "
                "is. Score the model before it is cut up, or cut it up by fully_shard."
            )
