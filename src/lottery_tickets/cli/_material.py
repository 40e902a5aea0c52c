"""The network, the data and the recipe of a plan: what `imp`, `verdict` and `stability` train."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from lottery_tickets.cli._own import called, own
from lottery_tickets.cli._plan import LENET, Plan
from lottery_tickets.errors import TrainingError
from lottery_tickets.vision import DATASETS, NETWORKS, lenet_300_100

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed import ProcessGroup

    from lottery_tickets.planning import MemoryPlan
    from lottery_tickets.vision import Images

_TESTED_AT_ONCE = 1000
_VALIDATION_SHARE, _VALIDATION_MOST = 10, 5000


@dataclass(frozen=True)
class Material:
    """What a plan names, found and put on a device.

    Args:
        plan: What was asked for.
        device: Where networks go, and images; data of the user's own is moved batch by batch.
        images: Those of the plan's dataset, where they have been read already.
    """

    plan: Plan
    device: torch.device
    images: Images | None = None

    def make_model(self, seed: int) -> nn.Module:
        """A new network with the weights of a seed.

        Raises:
            TrainingError: A function of the user's that fails, or gives no module.
        """
        from torch import nn

        from lottery_tickets.runs import private_random_state, seed_everything

        with private_random_state():
            seed_everything(seed)
            if self.plan.network is not None:
                return self._network(self.plan.network).to(self.device)
            spec = str(self.plan.model)
            model = called("--model", spec, self._own_model, seed)
        if not isinstance(model, nn.Module):
            raise TrainingError(f"--model {spec}: it returned {type(model).__name__}, not a torch module.")
        return model.to(self.device)

    def make_dataloaders(self, seed: int) -> tuple[Any, ...]:
        """Training and validation data, and test data where there is any.

        Raises:
            TrainingError: A function of the user's that fails, or gives something else.
        """
        from lottery_tickets.runs import private_random_state, seed_everything

        if self.plan.dataset is not None:
            return self._images
        spec = str(self.plan.data)
        with private_random_state():
            seed_everything(seed)
            given = called("--data", spec, self._own_data, seed)
        if isinstance(given, Mapping):
            given = [given[part] for part in ("train", "validation", "test") if part in given]
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            raise TrainingError(
                f"--data {spec}: it returns (train, validation) or (train, validation, test), or a mapping with "
                f"these names; got {_described(given)}."
            )
        return tuple(given)

    def recipe(self) -> dict[str, Any]:
        """How to train, as the library's functions take it."""
        plan = self.plan
        return {
            "epochs": plan.epochs,
            "eval_every_steps": plan.eval_every,
            "optimizer": plan.optimizer,
            "learning_rate": plan.learning_rate,
            "momentum": plan.momentum,
            "weight_decay": plan.weight_decay,
            "scheduler": self._scheduler(),
            "max_batch_size": plan.max_batch_size,
        }

    def planned(self, operation: str, group: ProcessGroup | None = None, **options: Any) -> MemoryPlan:
        """The memory of a training by this recipe, before it starts.

        Args:
            operation: What is done, as `plan_memory` calls it.
            group: Processes that share out every batch.
            options: Of the operation alone.
        """
        from lottery_tickets.planning import plan_memory, sizes_of
        from lottery_tickets.training import SharedBatches

        plan = self.plan
        rows, length = sizes_of(SharedBatches(self.make_dataloaders(0)[0], group))
        return plan_memory(
            self.make_model(0),
            operation,
            batch_size=rows,
            sequence_length=length,
            optimizer=plan.optimizer,  # type: ignore[arg-type]
            momentum=plan.momentum,
            max_batch_size=plan.max_batch_size,
            include=plan.include,
            exclude=plan.exclude,
            **options,
        )

    def rehearse(self) -> None:
        """Train a few weights for a step: what libraries load for it is not to be measured with a run."""
        import torch

        from lottery_tickets.cli._meter import rehearsing
        from lottery_tickets.iterative_pruning import compute_iterative_magnitude_pruning

        data = [(torch.zeros(2, 2), torch.tensor([0, 1]))]
        with rehearsing():
            compute_iterative_magnitude_pruning(
                torch.nn.Linear(2, 2).to(self.device),
                data,
                target_sparsity=0.5,
                num_iterations=1,
                eval_dataloader=data,
                epochs=1,
                optimizer=self.plan.optimizer,
                learning_rate=self.plan.learning_rate,
                progress=False,
            )

    def steps(self, option: str) -> int:
        """Of a whole training.

        Args:
            option: What wants to know, for the message.

        Raises:
            TrainingError: Training data that does not say how many batches it has.
        """
        if self.known_steps is None:
            raise TrainingError(
                f"{option} hangs on the length of training, and --data {self.plan.data} gives training data that "
                "does not say how many batches it has. Let it have a length, or give another value."
            )
        return self.known_steps

    @cached_property
    def known_steps(self) -> int | None:
        """The same; None where the data does not say."""
        try:
            return len(self.make_dataloaders(0)[0]) * self.plan.epochs
        except TypeError:
            return None

    def layer_fractions(self) -> dict[str, float]:
        """Those by glob, and that of the output layer by its name."""
        from glob import escape

        from lottery_tickets.masks import prunable_parameters

        plan = self.plan
        if plan.output_fraction is None:
            return plan.layer_fractions
        *_, last = prunable_parameters(self.make_model(0), plan.include, plan.exclude)
        return {**plan.layer_fractions, escape(last): plan.output_fraction}

    # ---------------------------------------------------------------- how it is trained

    def _scheduler(self) -> Callable[..., Any] | None:
        from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR

        if self.plan.schedule == "constant":
            return None
        steps = self.steps(f"--schedule {self.plan.schedule}")
        if self.plan.schedule == "cosine":
            return partial(CosineAnnealingLR, T_max=steps)
        return partial(MultiStepLR, milestones=[steps // 2, steps * 3 // 4])

    # ---------------------------------------------------------------- what is trained

    def _network(self, name: str) -> nn.Module:
        if name == LENET:
            return lenet_300_100(self.plan.init)
        return NETWORKS[name]()

    @cached_property
    def _own_model(self) -> Callable[..., Any]:
        return own("--model", str(self.plan.model))

    @cached_property
    def _own_data(self) -> Callable[..., Any]:
        return own("--data", str(self.plan.data))

    @cached_property
    def _images(self) -> tuple[Any, ...]:
        """The same for every seed: seeds differ in the order of the batches, not in what is held out."""
        from lottery_tickets.vision import TensorBatches

        images = self.images or DATASETS[str(self.plan.dataset)]()
        count, held_out = len(images.train_labels), self.plan.validation or held_out_of(images)
        if held_out >= count:
            raise TrainingError(
                f"--validation {held_out}: {self.plan.dataset} has {count} images to train on, and some of them "
                "are to be left."
            )
        rest, validation = images.split(held_out)
        batch_size = int(self.plan.batch_size or 1)
        train, validation_part, test = (
            (inputs.to(self.device), labels.to(self.device)) for inputs, labels in (rest[:2], validation, rest[2:])
        )
        return (
            TensorBatches(*train, batch_size, shuffle=True),
            TensorBatches(*validation_part, _TESTED_AT_ONCE),
            TensorBatches(*test, _TESTED_AT_ONCE),
        )


def held_out_of(images: Images) -> int:
    """How many images are kept apart where nobody says how many."""
    return min(len(images.train_labels) // _VALIDATION_SHARE, _VALIDATION_MOST)


def _described(given: Any) -> str:
    kind = type(given).__name__
    return f"{kind} of {len(given)}" if isinstance(given, (tuple, list)) else kind
