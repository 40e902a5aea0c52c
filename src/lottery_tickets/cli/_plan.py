"""What `imp` was asked for, written into its folder, so that `verdict` and `stability` can take it up."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lottery_tickets.errors import RunFolderError

if TYPE_CHECKING:
    from lottery_tickets.vision import Initialisation

LENET = "lenet-300-100"

_COMMAND = "imp"


@dataclass(frozen=True)
class Plan:
    """A network, its data, how it is trained and how it is pruned.

    Attributes:
        network: Name in `vision.NETWORKS`, or None.
        dataset: Name in `vision.DATASETS`, or None.
        model: `package.module:function` that gives the user's own, or None.
        data: Likewise of its data.
        init: How the weights of LeNet-300-100 are drawn; torch for all others.
        batch_size: Images an update.
        validation: Images of the training part that are kept apart; None for data of the user's own.
        epochs: Of the dense network.
        optimizer: sgd, adam or adamw.
        learning_rate: Of the optimizer.
        momentum: Of sgd.
        weight_decay: Of any.
        schedule: Name of a schedule of the learning rate.
        max_batch_size: Samples in a forward pass at most.
        eval_every: Steps between evaluations; None for epochs.
        rounds: How many.
        target: Sparsity of the last round; None where each round removes a fraction.
        prune_fraction: That fraction.
        output_fraction: The same for the last prunable tensor.
        layer_fractions: The same for tensors by glob.
        scope: global or layer.
        rewind: weights, learning_rate or none.
        rewind_epoch: The rewinding point, in epochs.
        rewind_step: The same in steps.
        include: What is prunable beside the usual.
        exclude: What is not.
    """

    network: str | None
    dataset: str | None
    model: str | None
    data: str | None
    init: Initialisation
    batch_size: int | None
    validation: int | None
    epochs: int
    optimizer: str
    learning_rate: float
    momentum: float
    weight_decay: float
    schedule: str
    max_batch_size: int | None
    eval_every: int | None
    rounds: int
    target: float | None
    prune_fraction: float | None
    output_fraction: float | None
    layer_fractions: dict[str, float]
    scope: str
    rewind: str
    rewind_epoch: int
    rewind_step: int | None
    include: list[str] | None
    exclude: list[str] | None

    @property
    def network_name(self) -> str:
        """What to call the network."""
        return self.network or str(self.model)

    @property
    def data_name(self) -> str:
        """What to call its data."""
        return self.dataset or str(self.data)

    def configuration(self) -> dict[str, Any]:
        """As a run's folder holds it."""
        return {"command": _COMMAND, **asdict(self)}

    @classmethod
    def of(cls, folder: Path) -> Plan:
        """What the run in a folder was asked for.

        Raises:
            RunFolderError: There is no run of `imp`, or one of another version.
        """
        from lottery_tickets.runs import RunFolder

        if not folder.is_dir():
            raise RunFolderError(f"{folder}: no such folder; give the folder that `imp` was told by -o.")
        told = RunFolder.configuration(folder)
        names = {field.name for field in fields(cls)}
        if told.pop("command", None) != _COMMAND or told.keys() != names:
            raise RunFolderError(
                f"{folder} holds a run, but none that this version's `imp` began; give the folder that `imp` was "
                "told by -o."
            )
        return cls(**told)
