"""Pairs of networks trained from the same weights in different orders, and the path between the two."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from lottery_tickets._arguments import check_seed
from lottery_tickets._stability._connectivity import Measuring, barrier_of, measure_path
from lottery_tickets._stability._results import SiblingPair
from lottery_tickets._stability._train import TrainFunction, Training
from lottery_tickets.errors import TrainingError
from lottery_tickets.masks import Mask, as_mask, held
from lottery_tickets.planning import refuse_if_too_large, refuse_training_if_too_large
from lottery_tickets.runs import RunFolder, decoded, encoded, private_random_state, seed_everything
from lottery_tickets.training import configuration, described, restore_tensors, tensors_of

MaskOfRun = Callable[[int, int], Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Settings:
    """What is trained, the results of which nothing else changes.

    Attributes:
        rewind_steps: Ascending.
        seeds: In the order of the results.
        mask: A digest, or the name of a function.
    """

    rewind_steps: list[int]
    seeds: list[int]
    mask: str | None

    def pairs(self) -> list[tuple[int, int]]:
        """(seed, step), in the order in which they are trained."""
        return [(seed, step) for seed in self.seeds for step in self.rewind_steps]


@dataclass
class Trunk:
    """The network of a seed on its way through the rewinding steps.

    Attributes:
        model: Its weights are those of `step` between two pairs.
        seed: Of its weights and of its order.
        step: Where it stands.
        state: What `train` returned there.
    """

    model: nn.Module
    seed: int
    step: int = 0
    state: Any = None


class Experiment:
    """The pairs of an instability analysis; see `compute_instability`.

    Args:
        make_model: Seed to network.
        train: Trains trunks and siblings.
        settings: Which pairs.
        measuring: How a path is measured.
        mask: A ticket that siblings are held to, or a function to one.
        run: The folder to write finished pairs and trunks to.
        check_memory: Refuse if more memory is needed than is free when a network is there.
    """

    def __init__(
        self,
        make_model: Callable[[int], nn.Module],
        train: TrainFunction,
        settings: Settings,
        measuring: Measuring,
        mask: Mapping[str, torch.Tensor] | MaskOfRun | None,
        run: RunFolder | None,
        *,
        check_memory: bool,
    ) -> None:
        self._make_model, self._train, self._settings = make_model, train, settings
        self._measuring, self._mask, self._run = measuring, mask, run
        self._check_memory = check_memory

    def pairs(self) -> Iterator[SiblingPair]:
        """Those that the folder has, and then the others, trained and measured one by one."""
        finished = [] if self._run is None else [cast("SiblingPair", line) for line in self._run.lines]
        yield from finished
        trunk: Trunk | None = None
        wanted = self._settings.pairs()
        left = wanted[len(finished) :]
        for seed, step in tqdm(
            left,
            desc="pairs of siblings",
            total=len(wanted),
            initial=len(finished),
            delay=2,
            disable=not self._measuring.progress,
        ):
            if trunk is None or trunk.seed != seed:
                trunk = None  # before the next one is made
                trunk = self._trunk(seed)
            self._advance(trunk, step)
            pair = self._pair(trunk)
            self._save(trunk, pair)
            yield pair

    # ---------------------------------------------------------------- the trunk

    def _trunk(self, seed: int) -> Trunk:
        """Where the run left it, or at step 0."""
        trunk = Trunk(made(self._make_model, seed), seed)
        self._refuse_if_too_large(trunk.model)
        saved = None if self._run is None else self._run.state
        if saved is not None and saved.values["seed"] == seed:
            restore_tensors(trunk.model, saved.tensors("model"))
            trunk.step = saved.values["step"]
            trunk.state = decoded(saved.values["state"], saved.tensors("others"))
        return trunk

    def _refuse_if_too_large(self, model: nn.Module) -> None:
        """Before a network is trained; of a user's training nothing is known."""
        if isinstance(self._train, Training):
            data, recipe = self._train.dataloader, self._train.recipe
            refuse_training_if_too_large("instability", model, data, recipe, check=self._check_memory)
        else:
            refuse_if_too_large("connectivity", model, check=self._check_memory)

    def _advance(self, trunk: Trunk, step: int) -> None:
        if step > trunk.step:
            trunk.state = self._trained(trunk, stop=step, seed=trunk.seed)
            trunk.step = step

    def _trained(self, trunk: Trunk, *, stop: int | None, seed: int) -> Any:
        """Train the trunk's model on from where it stands."""
        try:
            # Optimizers go on in the memory of the state that they are given, and it is given several times.
            state = deepcopy(trunk.state)
        except Exception as error:
            raise TrainingError(
                f"The state that train returned at step {trunk.step} cannot be copied ({error}). Return numbers, "
                "text, tensors, and lists and mappings of them."
            ) from error
        seed_everything(seed, trunk.step)  # for a train function that draws without seeding
        return self._train(trunk.model, start=trunk.step, stop=stop, seed=seed, state=state)

    # ---------------------------------------------------------------- siblings

    def _pair(self, trunk: Trunk) -> SiblingPair:
        """Two trainings to the end from where the trunk stands, which it comes back to, and the path between."""
        mask, seeds = self._mask_of(trunk), sibling_seeds(trunk.seed)
        with _coming_back(trunk.model):
            first = self._sibling(trunk, seeds[0], mask)
            first = {name: tensor.clone() for name, tensor in first.items()}
        with _coming_back(trunk.model):
            second = self._sibling(trunk, seeds[1], mask)
            _refuse_twins(trunk, first, second)
            curve = measure_path(trunk.model, first, second, self._measuring, mask)
        return SiblingPair(
            seed=trunk.seed,
            rewind_step=trunk.step,
            sibling_seeds=seeds,
            alphas=curve.alphas,
            losses=curve.losses,
            errors=curve.errors,
            loss_barrier=barrier_of(curve.losses),
            error_barrier=None if curve.errors is None else barrier_of(curve.errors),
        )

    def _sibling(self, trunk: Trunk, seed: int, mask: Mask | None) -> dict[str, torch.Tensor]:
        """The model's own tensors at the end."""
        with nullcontext() if mask is None else held(trunk.model, mask):
            self._trained(trunk, stop=None, seed=seed)
        return tensors_of(trunk.model)

    def _mask_of(self, trunk: Trunk) -> Mask | None:
        if self._mask is None:
            return None
        return as_mask(self._mask(trunk.seed, trunk.step) if callable(self._mask) else self._mask)

    # ---------------------------------------------------------------- the folder

    def _save(self, trunk: Trunk, pair: SiblingPair) -> None:
        if self._run is None:
            return
        self._run.record(pair)
        others: dict[str, torch.Tensor] = {}
        values = {"seed": trunk.seed, "step": trunk.step, "state": encoded(trunk.state, others, "state")}
        self._run.save(values, {"model": tensors_of(trunk.model), "others": others})


def sibling_seeds(seed: int) -> list[int]:
    """Seeds of the orders of a trunk's two siblings, of which any other trunk has others.

    The trunk's own order has its own seed, so that it is the network that iterative pruning of that seed trains.
    """
    words = np.random.SeedSequence((seed, 0x5B)).generate_state(2, np.uint64)
    return [int(word) >> 1 for word in words]


def made(make_model: Callable[[int], nn.Module], seed: int) -> nn.Module:
    """The network of a seed; a function that draws without seeding draws by it too."""
    torch.manual_seed(seed)
    model = make_model(seed)
    if not isinstance(model, nn.Module):
        raise TrainingError(f"make_model(seed) gives a torch module; it returned {type(model).__name__}.")
    return model


@contextmanager
def analysing(
    make_model: Callable[[int], nn.Module],
    train: TrainFunction,
    settings: Settings,
    measuring: Measuring,
    mask: Mapping[str, torch.Tensor] | MaskOfRun | None,
    *,
    run_dir: str | os.PathLike[str] | None,
    resume: bool,
    check_memory: bool,
) -> Iterator[Experiment]:
    """An experiment in its folder, what it draws at random not being seen outside."""
    parts = make_model, train, settings, measuring, mask
    with private_random_state():
        if run_dir is None:
            yield Experiment(*parts, None, check_memory=check_memory)
            return
        told = {
            **configuration("compute_instability", made(make_model, settings.seeds[0]), measuring.order, settings),
            **measuring.configuration(),
            "train": described(train),
        }
        if isinstance(train, Training):
            told |= {f"train: {name}": value for name, value in train.configuration().items()}
        with RunFolder.open(run_dir, told, resume=resume) as run:
            yield Experiment(*parts, run, check_memory=check_memory)


def checked_settings(
    rewind_steps: Sequence[int], seeds: Sequence[int], mask: Mapping[str, torch.Tensor] | MaskOfRun | None
) -> Settings:
    """Refuse what cannot be trained.

    Raises:
        TrainingError: No steps or no seeds, the same one twice, or anything but non-negative integers.
        MaskError: A mask that is none.
    """
    for name, values in (("rewind_steps", rewind_steps), ("seeds", seeds)):
        if not isinstance(values, Sequence) or not values or any(values.count(one) > 1 for one in values):
            raise TrainingError(f"{name} is a sequence of at least one number, each once; got {values!r}.")
    for seed in seeds:
        check_seed(seed)
    for step in rewind_steps:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise TrainingError(f"rewind_steps are non-negative integers, got {step!r}.")
    told = None if mask is None else str(described(mask)) if callable(mask) else as_mask(mask).digest()
    return Settings(rewind_steps=sorted(rewind_steps), seeds=list(seeds), mask=told)


@contextmanager
def _coming_back(model: nn.Module) -> Iterator[None]:
    """Afterwards weights and buffers are what they were."""
    before = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    try:
        yield
    finally:
        restore_tensors(model, before)


def _refuse_twins(trunk: Trunk, first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    if all(torch.equal(tensor, second[name]) for name, tensor in first.items()):
        raise TrainingError(
            f"Seed {trunk.seed}: the two siblings from step {trunk.step} are the same network, so nothing can be "
            "told from them. Either train draws nothing by its seed (a loader that does not shuffle has one order "
            "only), or no step was left to train."
        )
