"""Many forward passes through one model, side by side: all of them through one block before any enters the next.

Each forward pass is a coroutine (a greenlet) that pauses at the door of every block. So the weights of a block are
needed once, for all batches and tickets, and nothing of the model's own code has to be known or written again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from lottery_tickets.errors import MissingExtraError
from lottery_tickets.large_models._hidden_states import Away, StatesOnDisk, tensors_in
from lottery_tickets.large_models._on_demand import WeightsOnDemand
from lottery_tickets.masks import Mask

try:
    from greenlet import GreenletExit, getcurrent, greenlet
except ImportError as _error:
    raise MissingExtraError("greenlet", "hf") from _error

T = TypeVar("T")


class Conductor(Generic[T]):
    """Leads forward passes through the blocks of a model.

    Args:
        blocks: Doors at which forward passes wait for each other, in the order of the model.
        weights: Of the model.
        states: Where hidden states wait; None for memory.
        released: Called with the names of weights that have been read by all their layers, before they go.
        advanced: Called each time that a forward pass came to its next door, or to its end.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        weights: WeightsOnDemand,
        *,
        states: StatesOnDisk | None,
        released: Callable[[Iterable[str]], object],
        advanced: Callable[[], object],
    ) -> None:
        self._blocks, self._weights, self._states = blocks, weights, states
        self._released, self._advanced = released, advanced
        inside = {block: weights.names_in(block) for block in blocks}
        self._first, *others = inside.values()
        self._next = dict(zip(blocks, (*others, weights.names_outside(inside)), strict=True))

    def conduct(
        self, function: Callable[[Any, int], T], batches: Iterable[Any], tickets: Sequence[Mask | None]
    ) -> list[list[T]]:
        """What the function gives for every batch, for each of the tickets.

        Args:
            function: Calls the model on a batch; also told the number of the ticket.
            batches: Each is asked for once.
            tickets: None for the dense model.
        """
        forwards: list[_Forward[T]] = []
        try:
            with self._doors(), ThreadPoolExecutor(1, "read-ahead") as reader:
                fetched = reader.submit(self._weights.fetch, self._first)
                for batch in batches:
                    if self._states is not None:
                        self._states.spare(batch)
                    for number, ticket in enumerate(tickets):
                        forward = _Forward(len(forwards), number, partial(function, batch, number))
                        forwards.append(forward)
                        self._weights.use(ticket)
                        self._advance(forward)
                self._release()
                while waiting := [forward for forward in forwards if forward.waits]:
                    door = waiting[0].door
                    fetched.result()
                    fetched = reader.submit(self._weights.fetch, self._next.get(door, ()) if door else ())
                    self._lead_through([forward for forward in waiting if forward.door is door], tickets)
                self._released(self._weights.here())
        finally:
            for forward in forwards:
                forward.end()
            self._weights.release_all()
        return [[forward.result for forward in forwards if forward.ticket == one] for one in range(len(tickets))]

    def _lead_through(self, forwards: Iterable[_Forward[T]], tickets: Sequence[Mask | None]) -> None:
        """All of these through the block before which they wait, ticket by ticket."""
        for number, ticket in enumerate(tickets):
            self._weights.use(ticket)
            for forward in forwards:
                if forward.ticket == number:
                    self._advance(forward)
            self._weights.drop_copies()
        self._release()

    def _advance(self, forward: _Forward[T]) -> None:
        if self._states is not None and forward.away is not None:
            self._states.bring_back(forward.away)
        forward.away = None
        forward.go_on()
        if self._states is not None and forward.waits and forward.state is not None:
            forward.away = self._states.put_away(forward.number, forward.state)
        self._advanced()

    def _release(self) -> None:
        self._weights.use(None)
        self._released(self._weights.finished())
        self._weights.release()

    @contextmanager
    def _doors(self) -> Iterator[None]:
        """Forward passes pause before each block and behind the last one, within the block."""
        with ExitStack() as hooks:
            for block in self._blocks:
                handle = block.register_forward_pre_hook(_pause_before, with_kwargs=True)
                hooks.callback(handle.remove)
            hooks.callback(self._blocks[-1].register_forward_hook(_pause_behind).remove)
            yield


class _Forward(Generic[T]):
    """A forward pass that is under way.

    Attributes:
        number: Of this one among all.
        ticket: Number of its ticket.
        door: The block before which it waits; None behind the last, or at the end.
        state: What it will go on with, as far as that is known.
        away: Where that is, if it is in no memory.
        result: What the function gave, at the end.
    """

    def __init__(self, number: int, ticket: int, function: Callable[[], T]) -> None:
        self.number, self.ticket = number, ticket
        self.door: nn.Module | None = None
        self.state: torch.Tensor | None = None
        self.away: Away | None = None
        self.result: T
        self._pass = greenlet(function)
        self._pass.gr_context = copy_context()

    @property
    def waits(self) -> bool:
        """Whether it has begun and not ended."""
        return not self._pass.dead

    def go_on(self) -> None:
        """Go to the next door, or to the end."""
        self.state = None
        answer = self._pass.switch()
        if self._pass.dead:
            self.door, self.result = None, answer
        else:
            self.door, self.state = answer

    def end(self) -> None:
        """Break it off, if it has not ended."""
        if not self._pass.dead:
            self._pass.throw(GreenletExit)


def _pause_before(block: nn.Module, args: Any, kwargs: Any) -> None:
    getcurrent().parent.switch((block, next(iter(tensors_in([args, kwargs])), None)))


def _pause_behind(_block: nn.Module, _args: Any, output: Any) -> None:
    getcurrent().parent.switch((None, next(iter(tensors_in([output])), None)))
