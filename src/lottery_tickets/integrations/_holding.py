"""What the callbacks that train a ticket do."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import nn

from lottery_tickets.errors import MaskMismatchError, StateMismatchError
from lottery_tickets.integrations._adapters import beneath_adapters, uncompiled
from lottery_tickets.integrations._ranks import as_placed, refuse_parts
from lottery_tickets.masks import Mask, as_mask, held


class HoldingCallback:
    """Base of the callbacks that train a ticket: a `held` block that begins and ends by calls."""

    def __init__(
        self, mask: Mapping[str, torch.Tensor], *, rewind_to: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        self._mask = as_mask(mask)
        self._rewind_to = rewind_to
        self._block: ExitStack | None = None
        if rewind_to is not None and (missing := [name for name in self._mask if name not in rewind_to]):
            raise StateMismatchError(
                f"rewind_to lacks {len(missing)} tensors that the mask prunes, {missing[0]} for one; give the "
                "model's state_dict() of the step to go back to."
            )

    @property
    def mask(self) -> Mask:
        """The ticket."""
        return self._mask

    def close(self) -> None:
        """Let the weights go, which training that ended with an error may have left undone."""
        block, self._block = self._block, None
        if block is not None:
            block.close()

    def _hold(self, model: nn.Module, *, rewind: bool) -> None:
        """Zero the pruned weights and keep them so until `close`."""
        self.close()
        model = uncompiled(model)
        refuse_parts(model)
        if rewind and self._rewind_to is not None:
            _rewind(model, self._rewind_to)
        bare, mask, _ = beneath_adapters(model, self._mask)
        block = ExitStack()
        block.enter_context(held(bare, mask))
        self._block = block

    def _check_digest(self, digest: str) -> None:
        """Refuse to go on with another ticket than before.

        Raises:
            MaskMismatchError: It is another.
        """
        if digest != self._mask.digest():
            raise MaskMismatchError(
                f"The run that is to go on held the ticket {digest[:12]}, this is {self._mask.digest()[:12]}; "
                "give the same mask, or start anew."
            )


def _rewind(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Write saved tensors into the model's own.

    Raises:
        StateMismatchError: A name or shape that the model does not have; nothing is written then.
    """
    own: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    own.update(model.named_buffers(remove_duplicate=False))
    problems = [
        f"{name} {tuple(tensor.shape)}, the model has {tuple(own[name].shape) if name in own else 'none'}"
        for name, tensor in saved.items()
        if name not in own or own[name].shape != tensor.shape
    ]
    if problems:
        raise StateMismatchError(
            f"rewind_to is not of this {type(model).__name__}: {'; '.join(problems[:5])}. Give the state_dict() "
            "of the same model."
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(as_placed(tensor, own[name]))
