"""What a verdict was asked for: whose weights, which data, which networks, trained how."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from lottery_tickets._arguments import check_count, check_seed
from lottery_tickets._verdict._controls import CONTROLS, fresh_seed
from lottery_tickets._verdict._judging import DENSE, TICKET, check_seed_count
from lottery_tickets.errors import TrainingError, VerdictError
from lottery_tickets.masks import Mask, as_mask
from lottery_tickets.runs import seed_everything
from lottery_tickets.training import (
    DataOrder,
    Recipe,
    configuration,
    described,
    digest_of,
    restore_tensors,
    tensors_of,
)

MakeModel = Callable[[int], nn.Module]
MakeDataloaders = Callable[[int], Sequence[Any]]
OneMask = Mapping[str, torch.Tensor]
Ticket = OneMask | Sequence[OneMask] | Callable[[int], OneMask]
OneInitial = Mapping[str, torch.Tensor] | str | os.PathLike[str]
Initial = OneInitial | Sequence[OneInitial] | Callable[[int], OneInitial] | None

_ONE_TICKET = (
    "orders of the data, random masks and other initial weights, for one ticket on one set of weights: nothing is "
    "said of tickets found on others"
)
_TICKETS = "initial weights drawn by make_model, each with the ticket found for it, and orders of the data"


class Dataloaders(NamedTuple):
    """The data of one seed.

    Attributes:
        train: Batches, gone through once an epoch.
        validation: Batches; their loss says when to stop.
        test: Batches, or None.
    """

    train: Any
    validation: Any
    test: Any


@dataclass(frozen=True)
class Experiment:
    """The arguments of `compute_ticket_verdict` that say what is trained.

    Attributes:
        make_model: Seed to a network with the weights of that seed.
        make_dataloaders: Seed to training and validation data, and test data.
        tickets: One mask, or one for each seed.
        initial: What the ticket's weights are; None for what `make_model` gives.
        seeds: Two at least, all different.
        controls: Names of them, "dense" among them.
        epochs: Of each training.
        eval_every_steps: Batches between evaluations; None for epochs.
        recipe: How.
    """

    make_model: MakeModel
    make_dataloaders: MakeDataloaders
    tickets: Ticket
    initial: Initial
    seeds: tuple[int, ...]
    controls: tuple[str, ...]
    epochs: int
    eval_every_steps: int | None
    recipe: Recipe
    fresh: dict[int, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, function in (("make_model", self.make_model), ("make_dataloaders", self.make_dataloaders)):
            if not callable(function) or isinstance(function, nn.Module):
                raise VerdictError(
                    f"{name} is a function of a seed, such as `lambda seed: ...`, got {type(function).__name__}."
                )
        _check_seeds(self.seeds)
        _check_controls(self.controls)
        check_count("epochs", self.epochs)
        check_count("eval_every_steps", self.eval_every_steps)
        self._check_numbers()
        for seed in self.seeds:
            self.fresh[seed] = fresh_seed(seed, {*self.seeds, *self.fresh.values()})

    @property
    def networks(self) -> tuple[str, ...]:
        """All that are trained, in this order."""
        return (TICKET, *self.controls)

    @property
    def one_ticket(self) -> bool:
        """One mask for all seeds, and so one set of weights."""
        return isinstance(self.tickets, Mapping)

    @property
    def asks_for_tickets(self) -> bool:
        """Whether it may take long to get one."""
        return callable(self.tickets)

    @property
    def population(self) -> str:
        """What the seeds are a sample of."""
        return _ONE_TICKET if self.one_ticket else _TICKETS

    def ticket(self, seed: int) -> Mask:
        """The mask for a seed.

        Raises:
            VerdictError: One that removes nothing or everything.
        """
        mask = as_mask(_for_seed(self.tickets, seed, self.seeds))
        if not 0 < mask.kept < mask.numel:
            raise VerdictError(
                f"seed {seed}: the ticket keeps {mask.kept} of {mask.numel} weights; a ticket removes some and "
                "keeps some."
            )
        return mask

    def weights_seed(self, network: str, seed: int) -> int:
        """What `make_model` is called with; equal where the weights are to be."""
        if network == "random_reinit":
            return self.fresh[seed]
        return self.seeds[0] if self.one_ticket else seed

    def model(self, network: str, seed: int) -> nn.Module:
        """The network before its training."""
        number = self.weights_seed(network, seed)
        seed_everything(number)  # for functions that draw weights and do not seed
        model = self.make_model(number)
        if not isinstance(model, nn.Module):
            raise VerdictError(f"make_model({number}) gives a torch module; it gave {type(model).__name__}.")
        if self.initial is not None and network != "random_reinit":
            _put_into(model, _tensors(_for_seed(self.initial, seed, self.seeds)))
        return model

    def dataloaders(self, seed: int) -> Dataloaders:
        """The data of a seed."""
        seed_everything(seed)
        given = self.make_dataloaders(seed)
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise VerdictError(
                f"make_dataloaders({seed}) gives (train, validation) or (train, validation, test); it gave "
                f"{type(given).__name__}{f' of {len(given)}' if isinstance(given, (tuple, list)) else ''}."
            )
        return Dataloaders(given[0], given[1], given[2] if len(given) == 3 else None)

    def configuration(self) -> dict[str, Any]:
        """What a training's outcome hangs on, but for seed, network and mask, which its line says."""
        first = self.seeds[0]
        order = DataOrder(self.dataloaders(first).train, first)
        one = self.initial is not None and _is_single(self.initial)
        return {
            **configuration("compute_ticket_verdict", self.model(DENSE, first), order, self.recipe),
            "epochs": self.epochs,
            "eval_every_steps": self.eval_every_steps,
            "make_model": described(self.make_model),
            "make_dataloaders": described(self.make_dataloaders),
            "initial": digest_of(_tensors(cast("OneInitial", self.initial))) if one else None,
        }

    def _check_numbers(self) -> None:
        """One of all, or one for each seed."""
        for name, given in (("ticket", self.tickets), ("initial", self.initial)):
            if given is None or callable(given) or _is_single(given):
                continue
            if not isinstance(given, Sequence) or len(given) != len(self.seeds):
                count = f"{len(given)}" if isinstance(given, Sequence) else type(given).__name__
                raise VerdictError(
                    f"{name} is one for all seeds, a list with one for each, or a function of the seed; got "
                    f"{count} for {len(self.seeds)} seeds."
                )
        if self.initial is not None and not _is_single(self.initial) and self.one_ticket:
            raise VerdictError(
                "ticket is one mask, which is meant for one set of weights, and initial gives several. Give a "
                "ticket for each seed, or one initial."
            )
        if self.initial is not None and _is_single(self.initial) and not self.one_ticket:
            raise VerdictError(
                "initial is one set of weights, and ticket gives a mask for each seed, which are meant for "
                "different ones. Give the weights for each seed, or one mask."
            )


def _is_single(given: Any) -> bool:
    """One mask, or one set of weights."""
    return isinstance(given, (Mapping, str, os.PathLike))


def _for_seed(given: Any, seed: int, seeds: Sequence[int]) -> Any:
    if _is_single(given):
        return given
    return given(seed) if callable(given) else given[seeds.index(seed)]


def _tensors(given: OneInitial) -> Mapping[str, torch.Tensor]:
    if isinstance(given, Mapping):
        return given
    path = Path(given)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise VerdictError(
            f"{path}: no weights can be read from it ({error}); initial is a safetensors file, or a dict of "
            "tensors by name."
        ) from error


def _put_into(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Weights as `tensors_of` gives them, or as a `state_dict`: tied ones twice, and not all buffers."""
    if tensors_of(model).keys() == weights.keys():
        restore_tensors(model, weights)
        return
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"initial does not fit what make_model gives. {error}") from error


def _check_seeds(seeds: Sequence[int]) -> None:
    for seed in seeds:
        check_seed(seed)
    if len(set(seeds)) < len(seeds):
        raise VerdictError(f"seeds={tuple(seeds)}: a seed that comes twice is one observation, not two.")
    check_seed_count(len(seeds))


def _check_controls(controls: Iterable[str]) -> None:
    given = tuple(controls)
    unknown = [name for name in given if name not in CONTROLS]
    if unknown or len(set(given)) < len(given):
        raise VerdictError(
            f"controls are different ones of {', '.join(CONTROLS)}; got {', '.join(map(str, given))}."
        )
    if DENSE not in given:
        raise VerdictError(
            "controls lacks 'dense', and a verdict says how the ticket does beside the dense network. Add it."
        )
