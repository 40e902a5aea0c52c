"""One backward pass that leaves no gradient behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from lottery_tickets.gradients._taps import Receiver, Taps


class Backward:
    """The way back from the losses of one forward pass; can be gone more than once.

    Args:
        losses: (samples,), with their graph.
        taps: Attached during the forward pass.
        others: Name to the parameters, requiring gradients, that no tap stands for.
        rows: Positions of the samples to hand on; where there are `others`, or the batch is taken for one, only 0.
            None at all where the pass is made for other ranks.
    """

    def __init__(
        self, losses: torch.Tensor, taps: Taps, others: Mapping[str, Sequence[nn.Parameter]], rows: list[int]
    ) -> None:
        assert not others or rows in ([0], [])
        self._losses, self._taps, self._others, self._rows = losses, taps, others, rows

    def run(self, weights: torch.Tensor, receiver: Receiver, *, keep: bool = False) -> None:
        """Hand on the gradients of `weights @ losses`; keep the graph for another run if asked."""
        if not self._losses.requires_grad:  # none of the parameters took part
            return
        sums: dict[str, torch.Tensor] = {}
        left = Counter({name: len(ones) for name, ones in self._others.items()})

        def hand_on(name: str) -> None:
            gradient = sums.pop(name)
            if self._rows:
                receiver.receive(name, 0, gradient)
            receiver.finished(name)

        def consume(name: str) -> Callable[[torch.Tensor], None]:
            def hook(parameter: torch.Tensor) -> None:
                gradient = parameter.grad
                parameter.grad = None
                assert gradient is not None
                wide = (gradient.to_dense() if gradient.is_sparse else gradient).float()
                # Tied parameters that are several objects: the sum comes before anything is done with it.
                sums[name] = wide if name not in sums else sums[name] + wide
                left[name] -= 1
                if not left[name]:
                    hand_on(name)

            return hook

        objects = [(name, one) for name, ones in self._others.items() for one in ones]
        handles = [
            one.register_post_accumulate_grad_hook(consume(name))  # type: ignore[no-untyped-call]
            for name, one in objects
        ]
        try:
            with self._taps.backward(self._rows, receiver):
                torch.autograd.backward(
                    self._losses,
                    weights,
                    retain_graph=keep,
                    inputs=[self._taps.anchor, *(one for _, one in objects)],
                )
            for name in list(sums):
                hand_on(name)
        finally:
            for handle in handles:
                handle.remove()
            for _, one in objects:
                one.grad = None
